"""Importing gradproj changes no setting of the user's process."""

import json
import subprocess
import sys

# The libraries are imported first: what they set themselves is not gradproj's doing.
CHILD = """
import json, logging, os, pkgutil, signal, sys, threading, warnings
import importlib
import huggingface_hub, numpy, torch, transformers, zarr
import transformers.integrations.sdpa_attention
from transformers import AttentionInterface, masking_utils, modeling_utils
from zarr.dtype import data_type_registry


def torch_settings():
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": (
            torch.get_float32_matmul_precision(),
            cuda.matmul.allow_tf32,
            cuda.matmul.allow_bf16_reduced_precision_reduction,
            cuda.matmul.allow_fp16_reduced_precision_reduction,
        ),
        "cudnn": (cudnn.enabled, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic),
        "mkldnn": (torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic),
        "sdp": (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()),
        "random": torch.get_rng_state().sum().item(),
    }


def loggers():
    named = {name: logging.getLogger(name) for name in ("gradproj", "torch", "transformers", "zarr",
             "huggingface_hub", "datasets", "tqdm", "matplotlib", "asyncio", "")}
    return {
        name: (it.level, it.propagate, it.disabled, [repr(h) for h in it.handlers])
        for name, it in named.items()
    }


def identities(items):
    return {name: id(value) for name, value in items}


def snapshot():
    return {
        "zarr.config": repr(zarr.config.config),
        "zarr data types": {
            name: id(kind)
            for name, kind in data_type_registry.contents.items()
            if name != "bfloat16"  # registered for stores of that type, and chosen by name only
        },
        "zarr type of uint16": repr(data_type_registry.match_dtype(numpy.dtype("uint16"))),
        "environment": dict(os.environ),
        "signals": {int(s): repr(signal.getsignal(s)) for s in signal.valid_signals()},
        "signal wake-up": signal.set_wakeup_fd(-1),
        "torch": torch_settings(),
        "attention": identities(AttentionInterface._global_mapping.items()),
        "attention functions": identities(modeling_utils.ALL_ATTENTION_FUNCTIONS.items()),
        "masking_utils": identities(vars(masking_utils).items()),
        "bars": transformers.utils.logging.is_progress_bar_enabled(),
        "hub's bars": huggingface_hub.utils.are_progress_bars_disabled(),
        "verbosity": transformers.utils.logging.get_verbosity(),
        "hub's verbosity": huggingface_hub.utils.logging.get_verbosity(),
        "loggers": loggers(),
        "warnings": [repr(entry) for entry in warnings.filters],
        "sys.path": list(sys.path),
        "hooks": (id(sys.excepthook), id(threading.excepthook), id(sys.unraisablehook)),
        "numpy": (repr(numpy.geterr()), repr(numpy.get_printoptions())),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval(), sys.stdout, sys.stderr),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "folder": os.getcwd(),
        "umask": os.umask(0o22),
    }


before = snapshot()
import gradproj
import gradproj.cli.query.command
compiler = "numba" in sys.modules

names = []
for module in pkgutil.walk_packages(gradproj.__path__, "gradproj."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        names.append(module.name)
after = snapshot()
print(json.dumps({
    "imported": names,
    "compiler": compiler,
    "buckets": "obstore" in sys.modules,
    "changed": {name: [repr(before[name])[:2000], repr(after[name])[:2000]]
                for name in before if before[name] != after[name]},
}))
"""


def test_importing_every_module_changes_no_setting():
    # Extras that set things of their own are imported by few modules, and on use.
    child = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout.splitlines()[-1])
    assert {"gradproj.run", "gradproj.store.texts", "gradproj.training"} <= set(result["imported"])
    assert result["changed"] == {}
    assert not result["buckets"], "outputs on disk need no obstore"
    assert not result["compiler"], "a query that scans no packed rows or text waits for numba"
