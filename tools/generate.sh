#!/usr/bin/env bash
# Generates the Python stubs from protos/, and other projects' protos from the locked packages that have them: the rules that
# ours import (protos/buf, from protovalidate) and what an error carries (protos/google, from googleapis-common-protos).
# protoc and gRPC's plugin are older than what the servers run with, from tools/generator.lock: stubs work with the protobuf
# of their generator and the next major version, and callers cannot always have the newest.
#   tools/generate.sh FOLDER     writes them into FOLDER, which keeps its stubs where that fails
#   tools/generate.sh --verify   fails if gen/ is not what the protos give
set -euo pipefail
cd "$(dirname "$0")/.."

generate() {
    export PYTHONPATH=.venv/generator
    (cd protos && find tally -name '*.proto' | sort) | xargs python -m grpc_tools.protoc -Iprotos \
        --python_out="$1" --mypy_out=quiet,readable_stubs:"$1" buf/validate/validate.proto
    (cd protos && find tally -name '*_service.proto' | sort) | xargs python -m grpc_tools.protoc -Iprotos \
        --grpc_python_out="$1" --mypy_grpc_out=quiet:"$1"
    find "$1" -path '*/v1' -exec touch {}/py.typed \;
}

# In this folder, so that a finished file takes the place of an older one in one step.
work=$(mktemp -d -p . .generate.XXXXXX)
trap 'rm -rf "$work"' EXIT
fresh=$work/gen
mkdir "$fresh"
foreign=$work/foreign
python tools/export_validate_proto.py "$foreign"
mkdir -p "$foreign/google/rpc"
common=$(python -c 'from google.rpc import status_pb2; print(status_pb2.__file__.rpartition("/")[0])')
cp "$common/status.proto" "$common/error_details.proto" "$foreign/google/rpc"
buf format -w "$foreign"
if [ "$1" != --verify ]; then
    (cd "$foreign" && find . -type f) | while read -r file; do
        mkdir -p "protos/$(dirname "$file")"
        mv -f "$foreign/$file" "protos/$file"
    done
elif ! { diff -r "$foreign/buf" protos/buf && diff -r "$foreign/google" protos/google; }; then
    echo "protos/ is not what the locked packages have: run 'make generate' and commit the result" >&2
    exit 1
fi
generate "$fresh"

if [ "$1" = --verify ]; then
    if ! diff -r --exclude=__pycache__ --exclude='*.egg-info' --exclude=pyproject.toml --exclude=VERSION --exclude=build "$fresh" gen; then
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
