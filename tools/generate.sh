#!/usr/bin/env bash
# Generates the Python stubs from protos/.
#   tools/generate.sh FOLDER     writes them into FOLDER
#   tools/generate.sh --verify   fails if gen/ is not what the protos give
set -euo pipefail
cd "$(dirname "$0")/.."

generate() {
    find "$1" -name '*_pb2*' -delete
    (cd protos && find tally -name '*.proto' | sort) | xargs python -m grpc_tools.protoc -Iprotos -I.venv/protos \
        --python_out="$1" --mypy_out=quiet,readable_stubs:"$1" buf/validate/validate.proto
    (cd protos && find tally -name '*_service.proto' | sort) | xargs python -m grpc_tools.protoc -Iprotos -I.venv/protos \
        --grpc_python_out="$1" --mypy_grpc_out=quiet:"$1"
    find "$1" -path '*/v1' -exec touch {}/py.typed \;
}

if [ "$1" = --verify ]; then
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    generate "$fresh"
    if ! diff -r --exclude=__pycache__ --exclude='*.egg-info' --exclude=pyproject.toml --exclude=build "$fresh" gen; then
        echo "gen/ is not what protos/ gives: run 'make generate' and commit the result" >&2
        exit 1
    fi
else
    generate "$1"
fi
