#!/usr/bin/env bash
# Generates the Python stubs from protos/.
#   tools/generate.sh FOLDER     writes them into FOLDER, which keeps its stubs where that fails
#   tools/generate.sh --verify   fails if gen/ is not what the protos give
set -euo pipefail
cd "$(dirname "$0")/.."

generate() {
    (cd protos && find tally -name '*.proto' | sort) | xargs python -m grpc_tools.protoc -Iprotos -I.venv/protos \
        --python_out="$1" --mypy_out=quiet,readable_stubs:"$1" buf/validate/validate.proto
    (cd protos && find tally -name '*_service.proto' | sort) | xargs python -m grpc_tools.protoc -Iprotos -I.venv/protos \
        --grpc_python_out="$1" --mypy_grpc_out=quiet:"$1"
    find "$1" -path '*/v1' -exec touch {}/py.typed \;
}

# In this folder, so that a finished file takes the place of an older one in one step.
work=$(mktemp -d -p . .generate.XXXXXX)
trap 'rm -rf "$work"' EXIT
fresh=$work/gen
mkdir "$fresh"
generate "$fresh"

if [ "$1" = --verify ]; then
    if ! diff -r --exclude=__pycache__ --exclude='*.egg-info' --exclude=pyproject.toml --exclude=build "$fresh" gen; then
        echo "gen/ is not what protos/ gives: run 'make generate' and commit the result" >&2
        exit 1
    fi
    exit
fi
# Only what could be generated whole replaces what is there; whatever ends this, no stub is missing meanwhile.
(cd "$fresh" && find . -type f | sort) > "$work/generated"
while read -r file; do
    mkdir -p "$1/$(dirname "$file")"
    mv -f "$fresh/$file" "$1/$file"
done < "$work/generated"
(cd "$1" && find . -name '*_pb2*' -not -path '*/__pycache__/*' | sort) | comm -23 - "$work/generated" | while read -r file; do
    rm -f "$1/$file"
done
