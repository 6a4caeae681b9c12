"""What a profile says of a device's time: how long kernels ran, and where none did."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def profile_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("profile_step")


def test_kernels_that_overlap_count_once_and_gaps_lie_between_them(profile_step: ModuleType) -> None:
    runs = [("c", 20, 25), ("a", 0, 10), ("b", 4, 12), ("inside", 5, 6), ("d", 25, 26)]
    busy, gaps = profile_step.busy_and_gaps([profile_step.Kernel(*run) for run in runs])
    assert busy == 18
    assert gaps == [(8, "b", "c"), (0, "c", "d")]


def test_kernels_are_told_apart_by_their_names(profile_step: ModuleType) -> None:
    names = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT": "matrix products",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
        "_statistics_kernel": "head",
        "triton_red_fused_mean_mul_pow_3": "compiled",
        "void at::native::vectorized_elementwise_kernel": "pointwise",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "ncclKernel": "other",
    }
    assert {name: profile_step.group_of(name) for name in names} == names
