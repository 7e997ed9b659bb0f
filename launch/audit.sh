#!/usr/bin/env bash
# Known vulnerabilities of the installed packages (pip-audit, needs a network), and their licenses. Arguments go to pip-audit.
#   bash launch/audit.sh [--vulnerability-service osv]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
# Not into .venv: what audits must not change what is audited.
.venv/bin/python -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check pip-audit
mapfile -t site < <(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

.venv/bin/python - <<'EOF'
from importlib.metadata import distributions

found = {}
for each in distributions():
    about = each.metadata
    named = [line.split(" :: ")[-1] for line in about.get_all("Classifier", []) if line.startswith("License ::")]
    words = about.get("License-Expression") or ", ".join(named) or (about.get("License") or "").split("\n")[0][:60]
    found[about["Name"]] = (each.version, words or "unknown")
for name, (version, words) in sorted(found.items(), key=lambda item: item[0].lower()):
    print(f"{name:<32} {version:<20} {words}")
EOF
"$tools/venv/bin/pip-audit" --path "${site[0]}" --progress-spinner off "$@"
