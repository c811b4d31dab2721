/* The arithmetic of Play: LoRA on one matrix of 16 × 24, the same as lora_core/toy.py (a test holds the two together).
 * No library, no request, nothing of the page: it runs in node as well. */

export const D = 16, K = 24, SAMPLES = 64;
export const DEFAULT = {r: 4, alpha: 4, rule: "r", init: "A", std: 0.02, opt: "sgd", rate: 0.05, rstar: 3, spectrum: "halving",
  top: 4, inputs: "plain", noise: 0.5, seed: 2, eps: 1e-8};
export const scaleOf = (t) => t.alpha / {r: t.r, root: Math.sqrt(t.r), one: 1}[t.rule];

/* Standard normal numbers: mulberry32 and the cosine of Box and Muller. */
export function normals(seed, stream, n) {
  const out = new Float64Array(n);
  let a = (Math.imul(seed, 0x9E3779B1) + Math.imul(stream, 0x85EBCA77)) | 0;
  const next = () => {
    a = (a + 0x6D2B79F5) | 0;
    let t = Math.imul(a ^ a >>> 15, a | 1);
    t = (t + Math.imul(t ^ t >>> 7, t | 61)) ^ t;
    return (((t ^ t >>> 14) >>> 0) + 0.5) / 4294967296;
  };
  for (let i = 0; i < n; i++) { const x = next(), y = next(); out[i] = Math.sqrt(-2 * Math.log(x)) * Math.cos(2 * Math.PI * y); }
  return out;
}
function orthonormal(q, n, m) {
  for (let i = 0; i < n; i++) {
    const own = q.subarray(i * m, i * m + m);
    for (let again = 0; again < 2; again++) for (let j = 0; j < i; j++) {
      let dot = 0;
      for (let k = 0; k < m; k++) dot += own[k] * q[j * m + k];
      for (let k = 0; k < m; k++) own[k] -= dot * q[j * m + k];
    }
    const norm = Math.sqrt(square(own));
    for (let k = 0; k < m; k++) own[k] /= norm;
  }
  return q;
}
/* out (n × k) = f · a (n × m) b (m × k); the second form takes a transposed, the third b. */
function times(a, b, n, m, k, f = 1, out = new Float64Array(n * k)) {
  out.fill(0);
  for (let i = 0; i < n; i++) for (let j = 0; j < m; j++) { const x = f * a[i * m + j]; if (x) for (let l = 0; l < k; l++) out[i * k + l] += x * b[j * k + l]; }
  return out;
}
export function timesT1(a, b, n, m, k, f, out) {
  out.fill(0);
  for (let j = 0; j < m; j++) for (let i = 0; i < n; i++) { const x = f * a[j * n + i]; if (x) for (let l = 0; l < k; l++) out[i * k + l] += x * b[j * k + l]; }
  return out;
}
export function timesT2(a, b, n, m, k, f, out) {
  for (let i = 0; i < n; i++) for (let l = 0; l < k; l++) {
    let sum = 0;
    for (let j = 0; j < m; j++) sum += a[i * m + j] * b[l * m + j];
    out[i * k + l] = f * sum;
  }
  return out;
}
export const square = (x) => { let sum = 0; for (const v of x) sum += v * v; return sum; };
export const less = (a, b) => a.map((v, i) => v - b[i]);

export function problem(toy) {
  const n = toy.rstar, sigma = Float64Array.from({length: n}, (_, i) => toy.top * {halving: 0.5 ** i, flat: 1, linear: 1 - i / n}[toy.spectrum]);
  const U = orthonormal(normals(toy.seed, 2, n * D), n, D), V = orthonormal(normals(toy.seed, 3, n * K), n, K);
  const p = {U, V, sigma, W0: normals(toy.seed, 1, D * K).map((x) => x / Math.sqrt(K)), target: new Float64Array(D * K), C: null, R: null, rest: 0};
  for (let i = 0; i < n; i++) for (let d = 0; d < D; d++) for (let k = 0; k < K; k++) p.target[d * K + k] += U[i * D + d] * sigma[i] * V[i * K + k];
  if (toy.inputs === "stretched") {
    const Q = orthonormal(normals(toy.seed, 6, K * K), K, K), e = Float64Array.from({length: K}, (_, i) => 100 ** (-i / (K - 1)));
    const sum = e.reduce((x, y) => x + y), left = Q.map((x, i) => x * e[Math.floor(i / K)] * K / sum);
    p.C = timesT1(left, Q, K, K, K, 1, new Float64Array(K * K));
  } else if (toy.inputs === "samples") {
    const x = normals(toy.seed, 6, K * SAMPLES), E = normals(toy.seed, 7, D * SAMPLES).map((v) => v * toy.noise);
    p.C = timesT2(x, x, K, SAMPLES, K, 1 / SAMPLES, new Float64Array(K * K));
    p.R = timesT2(E, x, D, SAMPLES, K, 1 / SAMPLES, new Float64Array(D * K));
    p.rest = square(E) / SAMPLES;
  }
  const EC = new Float64Array(D * K);
  p.error = (X) => {
    const E = less(X, p.target), G = p.C ? times(E, p.C, D, K, K, 1, EC) : E;
    let a = 0, b = 0;
    for (let i = 0; i < E.length; i++) { a += G[i] * E[i]; if (p.R) b += E[i] * p.R[i]; }
    return a - 2 * b + p.rest;
  };
  p.gradient = (X, out = new Float64Array(D * K)) => {
    const E = less(X, p.target);
    if (p.C) times(E, p.C, D, K, K, 1, out); else out.set(E);
    if (p.R) for (let i = 0; i < out.length; i++) out[i] -= p.R[i];
    return out;
  };
  return p;
}

/* Every step of a training, the start included. what.full: with full fine-tuning beside it; what.keep: with the matrices. */
export function train(toy, steps, {full = true, keep = true, p = problem(toy)} = {}) {
  const s = scaleOf(toy), r = toy.r, on = (name) => toy.init === name || toy.init === "both";
  const A = normals(toy.seed, 4, r * K).map((x) => on("A") ? toy.std * x : 0), start = normals(toy.seed, 5, r * D);
  const B = new Float64Array(D * r).map((_, i) => on("B") ? toy.std * start[(i % r) * D + Math.floor(i / r)] : 0), F = new Float64Array(D * K);
  const film = {toy, problem: p, A: [], B: [], F: [], loss: [], held: [], full: [], fullHeld: [], diverged: false};
  const zero = p.error(F), size = square(p.target), all = full ? [A, B, F] : [A, B];
  const grads = all.map((w) => new Float64Array(w.length)), moments = all.map((w) => [new Float64Array(w.length), new Float64Array(w.length)]);
  const X = new Float64Array(D * K), G = new Float64Array(D * K);
  let p1 = 1, p2 = 1;
  for (let t = 0; ; t++) {
    times(B, A, D, r, K, 1, X);
    for (let i = 0; i < X.length; i++) X[i] *= s;
    if (keep) { film.A.push(A.slice()); film.B.push(B.slice()); if (full) film.F.push(F.slice()); }
    film.loss.push(p.error(X) / zero);
    if (p.R) film.held.push(square(less(X, p.target)) / size);
    if (full) { film.full.push(p.error(F) / zero); if (p.R) film.fullHeld.push(square(less(F, p.target)) / size); }
    film.diverged = !(film.loss[t] < 1e4);
    if (t === steps || film.diverged) break;
    p.gradient(X, G);
    timesT1(B, G, r, D, K, s, grads[0]);
    timesT2(G, A, D, K, r, s, grads[1]);
    if (full) p.gradient(F, grads[2]);
    p1 *= 0.9; p2 *= 0.999;
    all.forEach((w, j) => {
      const g = grads[j], [m, v] = moments[j];
      for (let i = 0; i < w.length; i++) {
        let move = g[i];
        if (toy.opt === "adam") {
          m[i] = 0.9 * m[i] + 0.1 * move;
          v[i] = 0.999 * v[i] + 0.001 * (move * move);
          const below = Math.sqrt(v[i] / (1 - p2)) + toy.eps;
          move = below > 0 ? m[i] / (1 - p1) / below : 0;
        }
        w[i] -= toy.rate * move;
      }
    });
  }
  return film;
}
export function productOf(film, t) {
  const s = scaleOf(film.toy), X = times(film.B[t], film.A[t], D, film.toy.r, K);
  return X.map((x) => x * s);
}
/* Singular values and vectors by Jacobi's rotations of the rows: X = U diag(sigma) V, largest first. */
export function svd(X, n = D, m = K) {
  const a = X.slice(), u = new Float64Array(n * n);
  for (let i = 0; i < n; i++) u[i * n + i] = 1;
  for (let sweep = 0, worst = 1; sweep < 40 && worst > 1e-15; sweep++) {
    worst = 0;
    for (let i = 0; i < n - 1; i++) for (let j = i + 1; j < n; j++) {
      let x = 0, y = 0, z = 0;
      for (let k = 0; k < m; k++) { const p = a[i * m + k], q = a[j * m + k]; x += p * p; y += q * q; z += p * q; }
      if (Math.abs(z) < 1e-300 || x * y === 0) continue;
      const off = Math.abs(z) / Math.sqrt(x * y);
      if (off < 1e-15) continue;
      worst = Math.max(worst, off);
      const w = (y - x) / (2 * z), t = (w < 0 ? -1 : 1) / (Math.abs(w) + Math.sqrt(1 + w * w)), c = 1 / Math.sqrt(1 + t * t), s = c * t;
      for (let k = 0; k < m; k++) { const p = a[i * m + k], q = a[j * m + k]; a[i * m + k] = c * p - s * q; a[j * m + k] = s * p + c * q; }
      for (let k = 0; k < n; k++) { const p = u[k * n + i], q = u[k * n + j]; u[k * n + i] = c * p - s * q; u[k * n + j] = s * p + c * q; }
    }
  }
  const norms = Float64Array.from({length: n}, (_, i) => Math.sqrt(square(a.subarray(i * m, i * m + m))));
  const order = [...norms.keys()].sort((i, j) => norms[j] - norms[i]);
  return {sigma: order.map((i) => norms[i]), rows: order.map((i) => a.slice(i * m, i * m + m)), columns: order.map((i) => Float64Array.from({length: n}, (_, k) => u[k * n + i]))};
}
export function cut(X, r) {
  const {rows, columns} = svd(X), out = new Float64Array(D * K);
  for (let i = 0; i < r; i++) for (let d = 0; d < D; d++) for (let k = 0; k < K; k++) out[d * K + k] += columns[i][d] * rows[i][k];
  return out;
}
export function sharesOf(p, X) {
  return Array.from(p.sigma, (sigma, i) => {
    let sum = 0;
    for (let d = 0; d < D; d++) for (let k = 0; k < K; k++) sum += p.U[i * D + d] * X[d * K + k] * p.V[i * K + k];
    return sum / sigma;
  });
}
/* For each rank the rate of which 30 steps end lowest, with a start of 0.2 and one direction of 0.25: what lies level suits all ranks. */
export const VALLEY_RULES = [["r", 4], ["root", 2], ["one", 1]], VALLEY_RANKS = [1, 2, 4, 8, 16];
export const VALLEY_RATES = Array.from({length: 27}, (_, i) => 2 ** (i / 2 - 9));
export function bestRate(toy, rule, alpha, r) {
  const base = {...toy, rule, alpha, r, init: "A", rstar: 1, top: 0.25, std: 0.2, inputs: "plain"}, p = problem(base);
  const losses = VALLEY_RATES.map((rate) => train({...base, rate}, 30, {full: false, keep: false, p}).loss[30] ?? 1e9);
  return losses.indexOf(Math.min(...losses));
}
/* The same over seeds 0 to 19: least, middle and most place among VALLEY_RATES, for each rank. A test measures them again. */
export const VALLEYS = {
  adam: {r: [[5, 7, 9], [5, 6, 8], [5, 6, 8], [5, 6, 8], [6, 8, 9]], root: [[6, 7, 9], [5, 7, 8], [5, 6, 8], [5, 6, 8], [4, 5, 7]], one: [[7, 8, 11], [5, 7, 9], [5, 6, 8], [3, 5, 6], [2, 3, 6]]},
  sgd: {r: [[10, 13, 15], [16, 17, 18], [19, 20, 21], [21, 22, 23], [23, 24, 24]], root: [[16, 17, 19], [18, 19, 19], [19, 20, 21], [19, 21, 22], [20, 22, 22]], one: [[20, 21, 22], [20, 20, 21], [19, 20, 21], [18, 19, 20], [16, 18, 19]]}};
const word = new Float32Array(1), bits = new Uint32Array(word.buffer);
const rounded = {fp32: Math.fround, bf16(x) { word[0] = x; bits[0] = (bits[0] + ((bits[0] >>> 16 & 1) + 0x7FFF)) & 0xFFFF0000; return word[0]; }};
/* W after each time of adding an adapter's update to W0 and taking it away again. */
export function swaps(toy, count, {dtype = "bf16", fresh = true, copy = false} = {}) {
  const p = problem(toy), round = rounded[dtype], known = new Map();
  let W = p.W0.map(round);
  const out = [W];
  for (let i = 0; i < count; i++) {
    const n = fresh ? i : i % 2;
    if (!known.has(n)) {
      if (fresh) known.clear();
      const U = orthonormal(normals(toy.seed, 100 + 2 * n, toy.rstar * D), toy.rstar, D), V = orthonormal(normals(toy.seed, 101 + 2 * n, toy.rstar * K), toy.rstar, K);
      for (let j = 0; j < U.length; j++) U[j] *= p.sigma[Math.floor(j / D)];
      known.set(n, timesT1(U, V, D, toy.rstar, K, 1, new Float64Array(D * K)).map(round));
    }
    const delta = known.get(n);
    if (!copy) W = W.map((w, j) => round(round(w + delta[j]) - delta[j]));
    out.push(W);
  }
  return out;
}
