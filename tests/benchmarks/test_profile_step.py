"""What a profile says of a device's time: how long kernels ran, and where none did."""

from profile_step import Kernel, busy_and_gaps, group_of


def test_kernels_that_overlap_count_once_and_gaps_lie_between_them() -> None:
    kernels = [Kernel("c", 20, 25), Kernel("a", 0, 10), Kernel("b", 4, 12), Kernel("inside", 5, 6), Kernel("d", 25, 26)]
    busy, gaps = busy_and_gaps(kernels)
    assert busy == 18
    assert gaps == [(8, "b", "c"), (0, "c", "d")]


def test_kernels_are_told_apart_by_their_names() -> None:
    names = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT": "matrix products",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
        "_statistics_kernel": "head",
        "triton_red_fused_mean_mul_pow_3": "compiled",
        "void at::native::vectorized_elementwise_kernel": "pointwise",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "ncclKernel": "other",
    }
    assert {name: group_of(name) for name in names} == names
