#!/usr/bin/env bash
# Gets a Chromium for the browser tests where that is possible: Debian's package as root, else Playwright's own build.
# Without one the browser tests are skipped, loudly; with CI=true that is a failure.
# usage: scripts/browser.sh PYTHON
set -u
python=${1:-python3}

have() { PYTHONPATH=. "$python" -m tests.browser_path >/dev/null 2>&1; }

have && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "browser tests: installing chromium with apt-get"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >/dev/null
  have && exit 0
fi
echo "browser tests: installing Playwright's Chromium"
"$python" -m playwright install chromium
have && exit 0

echo "*** no browser: the browser tests cannot run here ***" >&2
[ "${CI:-}" = true ] && exit 1
exit 0
