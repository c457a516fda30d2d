# Build the wheel, install it into an empty environment away from the checkout, run the script there.
set -eu
root=$(pwd)
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
"$BIN"/python -m build --wheel --outdir "$away/dist" . >"$away/build.log" 2>&1 || { cat "$away/build.log"; exit 1; }
"$PYTHON" -m venv "$away/venv"
"$away"/venv/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt torch==2.13.0 "$away"/dist/*.whl
cp models/digits_resnet20.pt "$away/model.pt"
cd "$away"
venv/bin/compress --help >/dev/null
venv/bin/compress prune model.pt --method halo --target 0.5 --epochs 2 --set bench.seconds=2 --out run --json -q \
    >result.json
venv/bin/compress verify run
venv/bin/python -c "
import json, compress, pathlib
assert not pathlib.Path(compress.__file__).is_relative_to('$root'), compress.__file__
report = json.loads(open('result.json').read().splitlines()[-1])
assert report['kept']['params'] <= 0.5, report['kept']
"
echo "the wheel works away from the checkout"
