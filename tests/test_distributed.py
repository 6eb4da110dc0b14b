"""A process's rank, job and device, and the ranks' rendezvous."""

import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as torch_dist
from helpers.forked_ranks import call_as_two_ranks, free_port

from gradproj.distributed import (
    JobName,
    Process,
    Rendezvous,
    World,
    choose_device,
    launcher_died,
    launcher_rank,
    process,
    process_group,
    rendezvous,
)
from gradproj.distributed.model_group import ModelGroup
from gradproj.errors import ConfigError, Ended, RanksError, ReportedError


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "CUDA_VISIBLE_DEVICES",
        "SLURM_JOB_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in (
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_RESTART_COUNT",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_GPUS_ON_NODE",
    ):
        monkeypatch.delenv(name, raising=False)


def test_process_without_a_launcher_is_rank_0_of_1():
    assert Process.from_environment() == Process(0, 1, 0, 1)


def test_ranks_that_make_no_whole_groups_are_refused():
    with pytest.raises(ConfigError, match="--ranks_per_model 2: the job has 3 ranks"):
        ModelGroup.join(2, Process(0, 3, 0, 3, launched=True), None, torch.device("cpu"))


def test_torchrun_variables_are_read(monkeypatch):
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert Process.from_environment() == Process(5, 8, 1, 4, launched=True)


def test_incomplete_launcher_variables_are_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="start the job with torchrun"):
        Process.from_environment()


def test_restarted_slurm_job_keeps_its_id_with_a_later_generation(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first = JobName.from_environment()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = JobName.from_environment()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    third = JobName.from_environment()
    assert first.job_id == second.job_id == third.job_id
    assert first.generation < second.generation < third.generation


def test_array_elements_are_separate_jobs(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    names = []
    for task in ("1", "2"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        names.append(JobName.from_environment().job_id)
    assert names == ["slurm-70_1", "slurm-70_2"]
    # One element's SLURM_JOB_ID is the array's. After a requeue it must outdate only the claims of
    # its own last start.
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    first = JobName.from_environment()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = JobName.from_environment()
    assert first.job_id == second.job_id == "slurm-70_2"
    assert first.generation < second.generation


def test_two_manual_starts_are_two_jobs():
    assert JobName.from_environment().job_id != JobName.from_environment().job_id


def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process.Path, "glob", lambda self, pattern: iter(()))


def test_auto_warns_when_it_chooses_the_cpu_beside_a_gpu(monkeypatch):
    no_gpu(monkeypatch)
    assert choose_device("auto", 0) == (torch.device("cpu"), None)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert choose_device("auto", 0)[1] is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    device, warning = choose_device("auto", 0)
    assert device == torch.device("cpu")
    assert warning.startswith(
        "WARNING: running on the CPU although CUDA_VISIBLE_DEVICES is set to '0,1'"
    )


def test_cuda_without_a_gpu_is_an_error(monkeypatch):
    no_gpu(monkeypatch)
    with pytest.raises(ConfigError, match="--device cuda: torch sees no GPU here"):
        choose_device("cuda", 0)


def test_more_ranks_than_gpus_on_a_node_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="local rank 2 has no GPU: this node has 2"):
        choose_device("auto", 2)


def test_launcher_rank_reads_the_launchers_variable(monkeypatch):
    assert launcher_rank() is None
    monkeypatch.setenv("RANK", "3")
    assert launcher_rank() == 3


def test_launcher_died_if_nothing_listens_at_its_store(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as store:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(store.getsockname()[1]))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        assert not launcher_died()
    assert launcher_died()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert not launcher_died(), "the store of another rank says nothing of the launcher"


def test_single_process_gets_back_what_it_exchanges():
    world, tensor = World.current(), torch.tensor([1.0, 2.0])
    assert world == World(0, 1)
    assert world.sum(tensor) is tensor
    assert world.gather("a") == ["a"]
    assert world.broadcast("a") == "a"
    world.barrier()


def exchange(rank, folder):
    """Exchange values as one of two ranks; save what this one gets."""
    torch_dist.init_process_group(
        "gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=2
    )
    world = World.current()
    result = world.sum(torch.tensor([rank + 1, 10])), world.gather(rank), world.broadcast(rank)
    world.barrier()
    torch.save((world, *result), folder / f"{rank}.pt")
    torch_dist.destroy_process_group()


def test_two_ranks_exchange_sums_lists_and_rank_0s_value(tmp_path):
    call_as_two_ranks(exchange, tmp_path)
    for rank in range(2):
        world, total, values, first = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert world == World(rank, 2)
        assert (total.tolist(), values, first) == ([3, 20], [0, 1], 0)


def wait_in_vain(rank, folder, port):
    """Enter a barrier that rank 1 reaches only after rank 0's timeout; save the errors."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    group = process_group(Process(rank, 2, rank, 2, launched=True), timeout=timedelta(seconds=2))
    # The timeout holds for the meeting too, and a busy machine may start one process later.
    (folder / f"{rank} started").touch()
    while not (folder / f"{1 - rank} started").exists():
        time.sleep(0.01)
    try:
        with group as world:
            world.barrier()
            while rank and not (folder / "0").exists():
                time.sleep(0.1)
            world.barrier()
    except Exception as error:
        (folder / str(rank)).write_text(f"{type(error).__name__}: {error}")


def test_timeout_of_a_collective_is_an_error_and_then_ends_the_other_rank_silently(tmp_path):
    port = free_port()
    call_as_two_ranks(wait_in_vain, tmp_path, port)
    first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert re.match("RanksError: rank 0 has waited 2 s for another rank, which hangs or", first)
    assert "Timed out waiting 2000ms" in first
    assert second == "ReportedError: "


@pytest.fixture
def store(monkeypatch):
    """torchrun's store for its ranks, kept from one start of them to the next."""
    server = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return server


def on_all_ranks(world_size, action):
    """Return the result of ``action`` on each rank, run in threads."""
    with ThreadPoolExecutor(world_size) as pool:
        ranks = [
            Process(rank, world_size, rank, world_size, launched=True) for rank in range(world_size)
        ]
        return list(pool.map(action, ranks))


def test_every_rank_gets_rank_0s_values_in_order(store):
    def start(process):
        with Rendezvous(process) as ranks:
            values = [ranks.from_rank_0((i, process.rank)) for i in range(2)]
            ranks.wait_for_all("a place")
        return values

    assert on_all_ranks(3, start) == [[(0, 0), (1, 0)]] * 3


def test_restarted_ranks_ignore_values_of_dead_ranks(store):
    for generation in range(3):

        def start(process, generation=generation):
            return Rendezvous(process).from_rank_0(generation)  # and dies

        assert on_all_ranks(3, start) == [generation] * 3


class Interrupted(Exception):
    """Raised by a signal's handler."""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("holder", ["agent", "rank 0"])
def test_rank_waits_in_python_for_a_rank_that_is_missing(rank, holder, store, monkeypatch):
    def interrupt(seconds):
        raise Interrupted

    if holder == "rank 0":
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(rendezvous.time, "sleep", interrupt)
    with pytest.raises(Interrupted):
        Rendezvous(Process(rank, 2, rank, 2, launched=True))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(rendezvous, "REPORT_AFTER_S", 0.02)
    monkeypatch.setattr(rendezvous, "COME_S", 0.2)


def test_missing_ranks_are_named_and_the_wait_for_them_ends(store, impatient, capsys):
    with pytest.raises(RanksError, match=r"^rank 0 has waited 0 s for rank 1, 2 of 3 to start; st"):
        Rendezvous(Process(0, 3, 0, 3, launched=True))
    message = "gradproj: rank 0 has waited 0 s for rank 1, 2 of 3 to start; it gives up after 0 s"
    assert message in capsys.readouterr().err.splitlines()


def test_rank_without_the_store_of_rank_0_names_its_address(store, impatient, monkeypatch, capsys):
    monkeypatch.setenv("MASTER_PORT", str(port := free_port()))
    with pytest.raises(RanksError, match=f"rank 0, which does not answer at 127.0.0.1:{port} "):
        Rendezvous(Process(1, 3, 1, 3, launched=True))
    assert f"does not answer at 127.0.0.1:{port} ([Errno 111]" in capsys.readouterr().err


def test_addresses_that_no_launcher_would_set_are_errors(store, monkeypatch):
    port = os.environ["MASTER_PORT"]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    with pytest.raises(ConfigError, match=f"rank 0 cannot listen at 127.0.0.1:{port} "):
        Rendezvous(Process(0, 2, 0, 2, launched=True))
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ConfigError, match="the launcher set MASTER_ADDR to '' and MASTER_PORT"):
        Rendezvous(Process(0, 2, 0, 2, launched=True))


def lose_store(action, monkeypatch, rank, holder="agent"):
    """Return what a rank raises whose store dies before ``action``."""
    server = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    ranks = on_all_ranks(2, Rendezvous)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(holder == "agent"))
    del server
    with pytest.raises((Ended, ReportedError)) as caught:
        action(ranks[rank])
    return caught.value


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "action",
    [
        lambda ranks: ranks.__exit__(None),
        lambda ranks: ranks.wait_for_all("a place"),
        # Rank 0's own write has no reply, so it may seem to have gone well.
        lambda ranks: (ranks.from_rank_0(1), ranks.wait_for_all("a place")),
    ],
    ids=["leave", "wait", "exchange"],
)
def test_launcher_that_dies_ends_the_ranks_with_one_line_a_machine(monkeypatch, action, rank):
    error = lose_store(action, monkeypatch, rank)
    assert isinstance(error, Ended)
    assert error.exit_code == 1
    line = "the launcher, torchrun, no longer answers at 127.0.0.1:"
    assert str(error).startswith(line) if rank == 0 else str(error) == ""


def test_rank_0_that_ends_with_the_store_ends_the_others_silently(monkeypatch):
    error = lose_store(lambda ranks: ranks.wait_for_all("x"), monkeypatch, 1, "rank 0")
    assert isinstance(error, ReportedError)
