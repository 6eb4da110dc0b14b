#!/usr/bin/env bash
# From nothing to an answer, on any Linux machine with Python 3.11 or newer: about 3 minutes on two
# cores once pip is done.
#   bash launch/demo.sh [--model DIR] [--shards TARS] [--text "..."]
# It makes a corpus of Python's own standard library, trains a small GPT-2 on it, projects the
# gradient of every document, and ranks the documents that support a text most. With --model (a
# directory or a name on the hub) or --shards (tars; the first 1,000 documents) it takes those.
# Everything it makes is in demo/; a later call reuses what is there. Remove demo/ to start over.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

MODEL="" SHARDS="" TEXT=""
while (($#)); do
    case $1 in
        --model=* | --shards=* | --text=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
        --model | --shards | --text) (($# > 1)) || fail "$1 needs a value; see bash $0 --help" ;;&
        --model) MODEL=$2 ;;
        --shards) SHARDS=$2 ;;
        --text) TEXT=$2 ;;
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) fail "unknown argument $1; see bash $0 --help" ;;
    esac
    shift 2
done
# Paths mean what they mean where the demo was called, which need not be the checkout.
[[ -z $MODEL || ! -d $MODEL ]] || MODEL=$(realpath "$MODEL")
[[ -z $SHARDS || $SHARDS == /* ]] || SHARDS=$PWD/$SHARDS

# step TITLE COMMAND...: says what it is about to do, and does it.
STARTED=$SECONDS STEP=0
title() {
    STEP=$((STEP + 1))
    printf '\n== %d of 7: %s\n' "$STEP" "$1"
}
step() {
    local began=$SECONDS
    title "$1"
    shift
    printf '   $'
    printf ' %s' "${@@Q}" | sed "s/'\([-A-Za-z0-9_.:=/,]*\)'/\1/g"
    echo
    "$@"
    echo "   ($((SECONDS - began)) s)"
}
have() {
    title "$1"
    echo "   is there already: $2"
}

# For a corpus that we do not know: the start of the document in the middle of the store.
beginning_of_a_document() {
    python - "$OUT" <<'END'
import sys

import numpy as np

from gradproj import ProjectionStore

with ProjectionStore(sys.argv[1]) as store:
    ok = np.flatnonzero(store.column("status") == 1)
    (sample,) = store.samples([ok[len(ok) // 2]], text=True)
    print(sample.text[:200])
END
}

set_up
cd "$ROOT"
export PATH="$VENV/bin:$PATH"
# Threads that wait must not keep a core busy: beside other work, training took three times as long
# with the default.
export OMP_WAIT_POLICY=PASSIVE
# What other data or models are asked for gets outputs of its own.
NAME="" && [[ -z $MODEL$SHARDS ]] || NAME=-$(cksum <<<"$MODEL|$SHARDS" | cut -d ' ' -f 1)
OUT=demo/out$NAME

if [[ -n $SHARDS ]]; then
    have "the corpus" "$SHARDS (its first 1,000 documents)"
elif compgen -G 'demo/tars/*.tar' >/dev/null; then
    SHARDS=demo/tars
    have "documents to tars: Python's standard library, one document per source file" "$SHARDS"
else
    SHARDS=demo/tars
    step "documents to tars: Python's standard library, one document per source file" \
        python -m gradproj prepare stdlib: --output_dir "$SHARDS"
fi

if [[ -n $MODEL ]]; then
    have "the tokenizer" "$MODEL"
    have "the model" "$MODEL"
else
    MODEL=demo/model$NAME
    if [[ -e $MODEL/tokenizer.json ]]; then
        have "a tokenizer: byte-level BPE" "$MODEL"
    else
        step "a tokenizer: byte-level BPE" \
            python -m gradproj tokenizer --shards "$SHARDS" --output_dir "$MODEL" \
            --vocab_size 4096 --max_samples 1000
    fi
    if [[ -e $MODEL/model.safetensors ]]; then
        have "a small GPT-2, trained on the first 256 tokens of every document" "$MODEL"
    else
        step "a small GPT-2, trained on the first 256 tokens of every document" \
            python -m gradproj train --method Regular --shards "$SHARDS" \
            --tokenizer "$MODEL" --result_dir "$MODEL" \
            --n_layer 4 --n_embd 256 --n_head 4 --max_length 256 --batch_size 8 --max_steps 150 \
            --learning_rate 1e-3 --device cpu --checkpoint_interval 50 --resume
    fi
fi

JOB=(--shards "$SHARDS" --model "$MODEL" --output_dir "$OUT" --device cpu)
[[ $SHARDS == demo/tars ]] || JOB+=(--max_samples 1000)
if python -m gradproj status "$OUT" >/dev/null 2>&1; then
    have "the plan of the job" "$OUT is complete"
    have "the job: the projected gradient of every document, by two processes" \
        "$OUT/projections.zarr"
else
    step "the plan of the job: every check before it starts" python -m gradproj plan "${JOB[@]}"
    step "the job: the projected gradient of every document, by two processes" \
        env OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 -m gradproj.run "${JOB[@]}"
fi
step "what is in the store" python -m gradproj status "$OUT"

if [[ -z $TEXT && $SHARDS == demo/tars ]]; then
    # From the docstring at the head of heapq.py, which has been the same since Python 2.3.
    TEXT='Heaps are arrays for which a[k] <= a[2*k+1] and a[k] <= a[2*k+2] for
all k, counting elements from 0.  For the sake of comparison,
non-existing elements are considered to be infinite.'
elif [[ -z $TEXT ]]; then
    TEXT=$(beginning_of_a_document)
fi
step "a query: the documents that most support a text" \
    python -m gradproj query "$OUT" --text "$TEXT" --score relatif --top_k 5 --bottom_k 0 \
        --show_text --device cpu

cat <<END

Done in $((SECONDS - STARTED)) s. Go on from here:
   source ${VENV#"$ROOT/"}/bin/activate
   python -m gradproj query $OUT --text "..." --score relatif --layers mlp --show_text
   python -c 'from gradproj import ProjectionStore; print(ProjectionStore("$OUT").rows([0, 1, 2]))'
END
