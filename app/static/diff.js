/* Which words of a text are not in another: the longest common run of words is kept, the rest is marked. */
export function changed(a, b) {
  const A = a.split(/\s+/).filter(Boolean).slice(0, 800), B = b.split(/(\s+)/), words = B.map((w, i) => [w, i]).filter(([w]) => w.trim()).slice(0, 800);
  const n = A.length, m = words.length, L = Array.from({length: n + 1}, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--)
    L[i][j] = A[i] === words[j][0] ? L[i + 1][j + 1] + 1 : Math.max(L[i + 1][j], L[i][j + 1]);
  const kept = new Set();
  for (let i = 0, j = 0; i < n && j < m;) {
    if (A[i] === words[j][0]) { kept.add(words[j][1]); i++; j++; } else if (L[i + 1][j] >= L[i][j + 1]) i++; else j++;
  }
  const isNew = B.map((w, k) => w.trim() ? !kept.has(k) : null), runs = [];      // a space between two new words is new too
  B.forEach((w, k) => {
    const is = Boolean(isNew[k] ?? (isNew[k - 1] && isNew[k + 1]));
    if (runs.length && runs.at(-1)[1] === is) runs.at(-1)[0] += w; else if (w) runs.push([w, is]);
  });
  return {runs, share: m ? kept.size / m : 0};
}
