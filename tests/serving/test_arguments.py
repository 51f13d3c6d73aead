"""Settings → the engine's arguments: what is chosen, and what may not be passed on."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import UsageError
from adapterhub.serving import arguments
from adapterhub.serving.arguments import OWNED, RANKS, Holding, ServeOptions
from adapterhub.serving.config import ServeConfig

CONFIG = ServeConfig(
    registry="file:///r",
    cache=Path("/c"),
    base=Path("/models/m"),
    base_name="m",
    host="127.0.0.1",
    port=8001,
    max_loras=4,
    max_cpu_loras=16,
    max_lora_rank=16,
)
OPTIONS = ServeOptions(base="m", registry="file:///r", cache=Path("/c"))


def holding(rank: int = 8, size: int = 10**6) -> Holding:
    return Holding(ref="acme/support@1", rank=rank, size=size)


class TestOwnedFlags:
    @pytest.mark.parametrize("flag", sorted(OWNED))
    def test_every_spelling_that_vllm_takes_is_refused_with_the_reason(self, flag: str) -> None:
        for spelling in (flag, flag.replace("-", "_"), f"{flag}=x", f"no-{flag}", flag[:-1], f"{flag}.a=1"):
            with pytest.raises(UsageError, match=f"--{spelling.partition('=')[0]} ") as error:
                arguments.check_vllm_args(("--enforce-eager", f"--{spelling}", "x"))
            assert error.value.why in OWNED.values()

    @pytest.mark.parametrize("flag", ["-asc", "-asc=2", "-asc2", "-as", "-dp", "-dpr", "-dp=2"])
    def test_short_spellings_are_refused(self, flag: str) -> None:
        with pytest.raises(UsageError, match="cannot be passed"):
            arguments.check_vllm_args((flag, "2"))

    def test_our_own_flags_say_where_to_put_them(self) -> None:
        with pytest.raises(UsageError) as error:
            arguments.check_vllm_args(("--max_loras", "8"))
        assert error.value.hint == "ah serve … --max-loras …"

    def test_a_model_without_a_flag_is_refused(self) -> None:
        with pytest.raises(UsageError, match="is not a flag"):
            arguments.check_vllm_args(("other/model",))

    def test_other_flags_go_to_vllm_last(self) -> None:
        extra = ("--enforce-eager", "--max-num-seqs", "16", "-tp", "2", "-O3", "--compilation-config.mode=0")
        arguments.check_vllm_args(extra)
        built = arguments.arguments(
            ServeOptions("m", "r", Path("/c"), vllm_args=extra), CONFIG, dtype="auto", on_cpu=True
        )
        assert tuple(built[-len(extra) :]) == extra

    @pytest.mark.slow
    def test_the_list_is_of_flags_that_vllm_has_and_refuses_no_other(self) -> None:
        """A release of vLLM that renames a flag, or adds one that is short for an owned one, shows here."""
        program = (
            "from vllm.utils.argparse_utils import FlexibleArgumentParser as P\n"
            "from vllm.entrypoints.launchers.cli_args import make_arg_parser as m\n"
            "print(*(o for a in m(P())._actions for o in a.option_strings), sep='\\n')"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        known = [line for line in done.stdout.splitlines() if line.startswith("-")]
        assert {f"--{flag}" for flag in OWNED} <= set(known)
        refused = {flag for flag in known if arguments._owned(flag)}
        meant = {f"--{flag}" for flag in OWNED} | {f"--no-{flag}" for flag in OWNED}
        assert {f for f in refused - meant if not f.startswith(("-asc", "-dp"))} == set()


class TestRanks:
    @given(st.lists(st.integers(1, 512)))
    def test_the_smallest_that_fits_all(self, ranks: list[int]) -> None:
        chosen = arguments.fitting_rank([holding(rank) for rank in ranks])
        assert chosen in RANKS
        assert chosen >= max([16, *ranks])
        assert not [rank for rank in RANKS if max([16, *ranks]) <= rank < chosen]

    def test_larger_than_any_engine_takes(self) -> None:
        with pytest.raises(UsageError, match="rank 513"):
            arguments.fitting_rank([holding(513)])

    def test_a_rank_that_vllm_does_not_take_names_the_next_one(self) -> None:
        arguments.check_rank(256)
        with pytest.raises(UsageError, match="--max-lora-rank 24") as error:
            arguments.check_rank(24)
        assert error.value.hint.endswith("--max-lora-rank 32")


class TestWorkingSet:
    def test_room_for_what_the_registry_holds_and_a_swap_of_every_slot(self) -> None:
        assert arguments.working_set([holding()] * 40, max_loras=4, memory=2**40) == 44

    def test_never_fewer_than_the_slots_nor_more_than_memory_allows(self) -> None:
        assert arguments.working_set([holding(size=2**30)] * 40, max_loras=4, memory=2**35) == 8
        assert arguments.working_set([holding(size=2**30)] * 40, max_loras=4, memory=2**30) == 4
        assert arguments.working_set([], max_loras=4, memory=2**30) == 16


class TestEnvironment:
    def build(self, inherited: dict[str, str]) -> dict[str, str]:
        return arguments.environment(inherited, CONFIG, defaults={"VLLM_CPU_KVCACHE_SPACE": "4"})

    def test_the_plug_in_gets_its_settings(self) -> None:
        assert ServeConfig.from_env(self.build({})) == CONFIG

    def test_back_doors_are_not_handed_on(self) -> None:
        doors = ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE", "VLLM_SKIP_MODEL_NAME_VALIDATION")
        built = self.build(dict.fromkeys(doors, "1") | {"VLLM_USE_RUST_FRONTEND": "1", "PATH": "/bin"})
        assert not set(doors) & set(built)
        assert built["VLLM_USE_RUST_FRONTEND"] == "0"
        assert built["PATH"] == "/bin"

    def test_other_plug_ins_stay_but_not_vllms_own_resolvers(self) -> None:
        built = self.build({"VLLM_PLUGINS": "my_platform,lora_filesystem_resolver"})
        assert built["VLLM_PLUGINS"] == "my_platform,adapterhub"

    def test_the_callers_values_win_over_defaults(self) -> None:
        assert self.build({})["VLLM_CPU_KVCACHE_SPACE"] == "4"
        assert self.build({"VLLM_CPU_KVCACHE_SPACE": "1"})["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_the_command_line() -> None:
    built = arguments.arguments(OPTIONS, CONFIG, dtype="float32", on_cpu=False)
    pairs = dict(pairwise(built))
    assert pairs["--model"] == "/models/m"
    assert pairs["--served-model-name"] == "base"
    assert (pairs["--host"], pairs["--port"], pairs["--api-server-count"]) == ("127.0.0.1", "8001", "1")
    assert (pairs["--max-loras"], pairs["--max-lora-rank"], pairs["--max-cpu-loras"]) == ("4", "16", "16")
    assert (pairs["--dtype"], pairs["--max-model-len"]) == ("float32", "auto")
    assert pairs["--middleware"] == "adapterhub.serving.middleware.TenancyMiddleware"
    assert {"--enable-lora", "--trust-request-chat-template", "--no-enable-log-requests"} <= set(built)
    assert "--enforce-eager" not in built


def test_on_a_cpu_vllm_is_told_that_nothing_is_compiled() -> None:
    wanted = ServeOptions("m", "r", Path("/c"), vllm_args=("--no-enforce-eager",))
    built = arguments.arguments(wanted, CONFIG, dtype="auto", on_cpu=True)
    assert built.index("--enforce-eager") < built.index("--no-enforce-eager")  # what a person says wins


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx avx2 fma", "float32"),
        ("fpu avx2 avx512f avx512bw avx512_bf16", "auto"),
        ("fp asimd bf16", "auto"),
        ("fp asimd", "float32"),
    ],
)
def test_the_dtype_follows_the_cpu(flags: str, dtype: str) -> None:
    assert arguments.cpu_dtype(flags.split()) == dtype
