"""`python -m bench gpu` on made-up outcomes and a clock of its own: order, budget, resuming, going on after failures.

Left out is what only a GPU can show: whether the tools' real output is what these samples say.
"""

import json
import time

import pytest
import torch

from bench import gpu, gpu_order, gpu_parts, sanitized
from bench.gpu_parts import Outcome, Part, Tune

HERE = {"cuda": "", "triton": ""}
NCU = """==PROF== Connected to process 4711
==PROF== Profiling "step" - 0: 0%....50%....100% - 2 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Block Size","Device","CC","Section Name","Metric Name",\
"Metric Unit","Metric Value"
"0","4711","python3","127.0.0.1","void step<4, true>(Launch)","(256, 1, 1)","0","9.0","Metrics",\
"dram__bytes_read.sum","byte","5,362,270,208"
"0","4711","python3","127.0.0.1","void step<4, true>(Launch)","(256, 1, 1)","0","9.0","Metrics",\
"dram__bytes_write.sum","byte","4,021,702,656"
"0","4711","python3","127.0.0.1","void step<4, true>(Launch)","(256, 1, 1)","0","9.0","Metrics",\
"gpu__time_duration.sum","nsecond","2,303,488"
"0","4711","python3","127.0.0.1","void step<4, true>(Launch)","(256, 1, 1)","0","9.0","Metrics",\
"lts__t_sector_hit_rate.pct","%","38.25"
"0","4711","python3","127.0.0.1","void step<4, true>(Launch)","(256, 1, 1)","0","9.0","Metrics",\
"launch__registers_per_thread","register/thread","n/a"
==PROF== Disconnected from process 4711
"""


class Fake:
    """Runs nothing: hands out outcomes by the word they are filed under, and lets its clock go on.

    Attributes:
        ran: commands, in order.
    """

    def __init__(self, outcomes=None, takes=10.0):
        self.outcomes, self.takes, self.now, self.ran = outcomes or {}, takes, 0.0, []

    def run(self, words, limit, env):
        line = " ".join(words)
        self.ran.append(line)
        outcome = next((found for key, found in self.outcomes.items() if key in line), Outcome(0, "3 passed"))
        self.now += limit if outcome.status is None else min(self.takes, limit)
        return outcome

    def clock(self):
        return self.now


def empty():
    return {"parts": {}, "skipped": [], "counters": [], "copies": [], "rows": []}


def session(tmp_path, fake, budget=1000, document=None):
    return gpu.Session(document or empty(), tmp_path, budget, fake.run, fake.clock)


def states(document):
    return {name: record["state"] for name, record in document["parts"].items()}


def saved(tmp_path):
    return json.loads((tmp_path / "results.json").read_text())


PARTS = [Part(name, (name,)) for name in "abc"]


def test_parts_run_in_order_and_each_is_on_disk_when_the_next_begins(tmp_path):
    seen = []

    class Looking(Fake):
        def run(self, words, limit, env):
            seen.append(list(saved(tmp_path)["parts"]) if self.ran else [])
            return super().run(words, limit, env)

    fake = Looking()
    session(tmp_path, fake).run(PARTS)
    assert fake.ran == ["a", "b", "c"] and seen == [[], ["a"], ["a", "b"]]
    assert set(states(saved(tmp_path)).values()) == {"passed"}


def test_failures_and_timeouts_are_kept_and_do_not_end_the_run(tmp_path):
    told = f"{gpu.ROOT}/csrc/x.cu: what it said\n" + "line\n" * 100 + "last line"
    fake = Fake({"a": Outcome(3, told), "b": Outcome(None, "so far")})
    session(tmp_path, fake).run(PARTS)
    parts = saved(tmp_path)["parts"]
    assert states(saved(tmp_path)) == {"a": "failed", "b": "timed out", "c": "passed"}
    assert parts["a"]["reason"] == "exit status 3: last line" and len(parts["a"]["tail"]) == gpu.TAIL
    assert parts["b"]["reason"] == "after 60 s" and parts["b"]["tail"] == ["so far"] and "tail" not in parts["c"]


def test_results_that_cannot_be_read_fail_their_part_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    [rows] = gpu_order.rows([("tiny", "fp32")], ("AdamW",), "core", {"cuda": "", "triton": "no"})
    (tmp_path / rows.json).parent.mkdir(parents=True)
    (tmp_path / rows.json).write_text('{"rows": [')
    session(tmp_path, Fake()).run([rows, *PARTS])
    assert states(saved(tmp_path)) == {rows.name: "failed"} | dict.fromkeys("abc", "passed")


def test_the_budget_bounds_limits_and_leaves_what_no_longer_fits(tmp_path):
    fake = Fake({"a": Outcome(None, "")})
    session(tmp_path, fake, budget=gpu.RESERVE + 65).run([*PARTS, Part("d", ("d",), seconds=3, limit=60)])
    assert fake.ran == ["a", "d"] and fake.now == 65
    parts = saved(tmp_path)["parts"]
    assert parts["b"] == {"state": "left", "reason": "5 s were left, it takes about 10", "seconds": 0.0}
    assert parts["d"]["state"] == "passed"


def test_what_cannot_run_is_skipped_with_its_reason(tmp_path):
    session(tmp_path, Fake()).run([Part("a", missing="ncu was not found")])
    assert saved(tmp_path)["parts"]["a"] == {"state": "skipped", "reason": "ncu was not found", "seconds": 0.0}


def test_a_second_run_does_what_has_not_passed(tmp_path):
    session(tmp_path, Fake({"b": Outcome(1, "")})).run(PARTS)
    again = Fake()
    session(tmp_path, again, document=saved(tmp_path)).run(PARTS)
    assert again.ran == ["b"] and set(states(saved(tmp_path)).values()) == {"passed"}


def test_results_of_other_sources_versions_or_gpus_are_not_gone_on_with(tmp_path):
    def document(digest="1", gpu="G", torch="2"):
        about = {"sources": {"digest": digest}, "machine": {"gpu": gpu, "driver": "5"}, "versions": {"torch": torch}}
        return empty() | about | {"date": "now"}

    path = tmp_path / "results.json"
    assert gpu.resumed(document(), path)["parts"] == {}
    path.write_text(json.dumps(document() | {"parts": {"a": {}}, "date": "before"}))
    assert gpu.resumed(document(), path)["parts"] == {"a": {}}
    assert gpu.resumed(document(), path)["continued"] == ["now"]
    for other in (document(digest="2"), document(gpu="H"), document(torch="3")):
        assert gpu.resumed(other, path) is other


def test_failed_rows_are_halved_so_that_one_rule_takes_no_other_along(tmp_path):
    [rows] = gpu_order.rows([("tiny", "fp32")], ("AdamW", "LARS"), "core", HERE)
    fake = Fake({"LARS(backend='triton')": Outcome(1, "no such rule")})
    session(tmp_path, fake).run([rows, Part("other", ("other",)), Tune("tune cuda")])
    last = fake.ran.pop()
    assert "tune --backend cuda" in last and [
        line.partition("--optimizers ")[2].partition(" ")[0] for line in fake.ran
    ] == [
        "AdamW(backend='cuda'),LARS(backend='cuda'),AdamW(backend='triton'),LARS(backend='triton')",
        "",
        "AdamW(backend='cuda'),LARS(backend='cuda')",
        "AdamW(backend='triton'),LARS(backend='triton')",
        "AdamW(backend='triton')",
        "LARS(backend='triton')",
    ]


def test_the_order_is_by_importance():
    names = [part.name for part in gpu_order.ordered(HERE, "results.json")]
    wanted = ["steps cuda", "rows bert-large fp32 core", "rows resnet50 fp32 core", "memcheck", "racecheck"]
    wanted += [
        "ncu AdamW cuda",
        "rows gpt2 fp32 core",
        "rows bert-large fp32 rest",
        "tests/test_triton_gpu.py",
        "tune triton",
        "model",
    ]
    assert [name for name in names if name in wanted] == wanted
    assert len(names) == len(set(names)), "names are what a second run knows parts by"
    assert sum(name.startswith("rows") for name in names) == 5 * 2 * 2


def test_without_the_cuda_engine_triton_is_measured_alone():
    parts = {part.name: part for part in gpu_order.ordered(HERE | {"cuda": "no nvcc"}, "results.json")}
    assert "cuda" not in " ".join(parts["rows bert-large fp32 core"].optimizers)
    assert {parts[name].missing for name in ("steps cuda", "memcheck", "ncu AdamW cuda")} == {"no nvcc"}
    assert not parts["steps triton"].missing and not parts["tune triton"].missing


def test_test_files_that_need_absent_packages_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "helper.py").write_text("import json\nfrom absent_one.part import x\n")
    (tmp_path / "tests" / "test_cuda_a.py").write_text("import helper\nimport absent_two as two, sys\n")
    (tmp_path / "tests" / "test_cuda_b.py").write_text("import json\ndef f():\n    import absent_three\n")
    monkeypatch.setattr(gpu_order, "ROOT", tmp_path)
    first, second = gpu_order.tests("test_cuda_*.py")
    assert first.missing == "it needs absent_one, absent_two, not installed" and not second.missing
    assert [part.missing for part in gpu_order.tests("test_x_*.py")] == ["there is no such file"]


def test_pytest_outcomes():
    def judged(status, output):
        return gpu_parts.Tests("t").judge(Outcome(status, output))

    assert judged(0, "..\n14 passed in 3 s\n") == ("passed", "14 passed in 3 s")
    assert judged(5, "SKIPPED [1] t.py: no\n1 skipped") == ("skipped", "SKIPPED [1] t.py: no; exit status 5: 1 skipped")
    assert judged(1, "FAILED t.py::x\n1 failed") == ("failed", "FAILED t.py::x; exit status 1: 1 failed")


def test_tools_that_the_machine_forbids_are_skipped():
    refused = Outcome(1, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n")
    assert gpu_parts.Counters("n").judge(refused) == ("skipped", refused.output.strip("= \n"))
    assert gpu_parts.Sanitizer("s").judge(Outcome(1, "========= Error: Device not supported"))[0] == "skipped"
    assert gpu_parts.Sanitizer("s").judge(Outcome(9, "========= ERROR SUMMARY: 1 error"))[0] == "failed"
    assert gpu_parts.Counters("n").judge(Outcome(0, "No kernels were profiled")) == ("failed", "ncu has seen no kernel")


def test_ncu_is_read(tmp_path):
    part = next(part for part in gpu_order.counted(HERE) if part.name == "ncu AdamW triton")
    document = empty()
    assert part.judge(Outcome(0, NCU)) == ("passed", "")
    part.keep(Outcome(0, NCU), document, tmp_path)
    [found] = document["counters"]
    assert found["dram_read_bytes"] == 5362270208 and found["seconds"] == pytest.approx(2.303488e-3)
    assert found["l2_hit_percent"] == 38.25 and found["kernel"] == "void step<4, true>(Launch)"
    assert found["dram_words_per_element"] == pytest.approx(7.0, rel=1e-3), "of bert-large's 335 M"
    assert "127.0.0.1" not in json.dumps(document)


def test_a_command_is_stopped_with_all_it_has_started():
    begin = time.perf_counter()
    found = gpu.execute(["sh", "-c", "echo $WORD; sleep 30 & wait"], 0.3, {"WORD": "begun"})
    assert found == Outcome(None, "begun\n") and time.perf_counter() - begin < 5
    assert gpu.execute(["sh", "-c", "exit 7"], 5, {}) == Outcome(7, "")


def test_a_few_steps_agree_with_the_reference_and_a_difference_is_seen(monkeypatch):
    assert not list(sanitized.differences("AdamW", "cpu", torch.float32, "cpu"))
    trained = sanitized.trained
    other = {"cpu": "AdamW(eps=0.1)", "reference": "AdamW"}
    monkeypatch.setattr(sanitized, "trained", lambda text, backend, *rest: trained(other[backend], backend, *rest))
    assert len(list(sanitized.differences("AdamW", "cpu", torch.float32, "cpu"))) == len(sanitized.SHAPES) - 1, (
        "but (0,)"
    )
