"""What the README says is what the records say: planted rows give exact tables, and a changed number is found."""

import csv
import re
import subprocess

import pytest
import typer
from matplotlib.figure import Figure
from typer.testing import CliRunner

from benchmarks import against, report, sweep
from benchmarks.tables import of_one_commit
from tools import records
from tools.records import append

HERE = {"device": "A processor, 4 cores", "driver": "", "threads": "4", "load": "0.5", "python": "3.11.7"}
HERE |= {"torch": "2.15.0", "triton": "3.9.0", "dali": "2.4.0", "commit": "abc1234", "date": "2026-01-02"}
LINE = "A processor, 4 cores, threads 4, load 0.5, torch 2.15.0, DALI 2.4.0, commit abc1234, 2026-01-02; "


def rendered(name, rows, tmp_path, **conditions):
    """A block, through a CSV."""
    append(tmp_path / f"{name}.csv", [row | HERE | conditions for row in rows])
    return report.written(name, tmp_path)


def swept(batch_size, **changes):
    row = {"preset": "cpu", "batch_size": batch_size, "micro_batch": 64, "world_size": 1, "size": 32}
    row |= {"encoder": "resnet18", "precision": "no", "repeats": 3, "rounds": 3, "loader_images_per_s": 1234.5}
    row |= {"synthetic_images_per_s": 400, "together_images_per_s": 396, "ratio": 0.99, "ratio_p20": 0.98}
    row |= {"ratio_p80": 0.995, "data_wait_percent": 1.25}
    row |= {"step_ms_p50": 646.46, "step_ms_p95": 700, "peak_device_mib": "", "peak_host_mib": 1852.9}
    row |= {"gpu_utilisation_percent": "", "gpu_power_w": "", "status": "ok", "verdict": "the model limits"}
    row |= {"data": "small, 1000 images", "loader_threads": 1}
    return row | {"command": f"python -m benchmarks.sweep --preset cpu --batch-size {batch_size}"} | changes


def test_a_commit_is_marked_where_more_than_records_differs(tmp_path, monkeypatch):
    """A benchmark that adds its rows measures the same code as before."""

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], cwd=tmp_path, check=True)

    files = [
        tmp_path / name for name in ("benchmarks/records/sweep.csv", "benchmarks/README.md", "README.md", "train.py")
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("first")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(records, "ROOT", tmp_path)
    marked = []
    for file in files:
        file.write_text("second")
        marked.append(records.environment("cpu")["commit"].endswith("+"))
    assert marked == [False, False, False, True]


@pytest.mark.parametrize("git", ["missing", "no repository"])
def test_without_git_the_commit_comes_from_the_environment(git, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    if git == "missing":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("SWIFTCLR_COMMIT", raising=False)
    with pytest.raises(RuntimeError, match="set SWIFTCLR_COMMIT to the commit of"):
        records.environment("cpu")
    monkeypatch.setenv("SWIFTCLR_COMMIT", "abc1234")
    assert records.environment("cpu")["commit"] == "abc1234"


NOTHING = dict.fromkeys(
    [
        name
        for name, value in swept(0).items()
        if name.endswith(("_s", "ratio", "percent", "p20", "p80", "p50", "p95", "mib"))
    ],
    "",
)


def test_a_sweep_is_a_line_per_batch_ascending_the_newest_of_each(tmp_path):
    """Nothing stands where nothing was measured; what no line has is no column."""
    rows = [swept(512), swept(256, together_images_per_s=1), swept(256)]
    rows += [swept(1024, **NOTHING, status="out of memory", verdict="")]
    ratio = "0.990 (0.980 to 0.995, 3 rounds)"
    assert rendered("sweep", rows, tmp_path) == (
        "\n`cpu`: resnet18 at 32 px, fp32; images/s of the loader alone, the step alone on synthetic views, and both "
        "together, with the median of the rounds' ratios (p20 to p80).\n\n"
        "| batch | micro-batch | loader | synthetic | together | together / synthetic | data_wait | step ms | p95 "
        "| host MiB | verdict |\n" + "| --- " * 11 + "|\n"
        f"| 256 | 64 | 1,234 | 400 | 396 | {ratio} | 1.25 % | 646 | 700 | 1,853 | the model limits |\n"
        f"| 512 | 64 | 1,234 | 400 | 396 | {ratio} | 1.25 % | 646 | 700 | 1,853 | the model limits |\n"
        "| 1024 | 64 | – | – | – | – | – | – | – | – | out of memory |\n"
        "\nsmall, 1000 images, listed 3 times, so in memory: `python -m benchmarks.sweep --preset cpu`\n"
        f"\n{LINE.replace('threads 4', f'threads 4, the loader{chr(39)}s 1')}"
        "`sweep.csv`, [plot](records/sweep-cpu.png)\n\n"
    )


def test_a_preset_of_another_network_begins_anew_and_a_noisy_row_says_so(tmp_path):
    """Rows of two networks make no table together."""
    rows = [swept(256), swept(512), swept(512, encoder="resnet50", verdict="", status="noisy")]
    text = rendered("sweep", rows, tmp_path)
    assert "resnet50" in text
    assert "| 256 |" not in text
    assert "| noisy |" in text


def test_an_older_row_whose_rounds_lie_on_both_sides_has_no_verdict(tmp_path):
    rows = [swept(256, ratio_p20=0.95, ratio_unknown=""), swept(512, ratio_p20=0.95, ratio_unknown=0.01)]
    lines = [line for line in rendered("sweep", rows, tmp_path).splitlines() if line.startswith(("| 256", "| 512"))]
    assert [line.split(" | ")[-1] for line in lines] == ["noisy |", "the model limits |"]


def test_presets_processes_and_gpus_have_tables_of_their_own(tmp_path):
    rows = [swept(256), swept(256, world_size=8), swept(256, preset="imagenet")]
    gpu = {"gpu_utilisation_percent": 98.7, "gpu_power_w": 612.3, "peak_device_mib": 70000}
    rendered("sweep", rows, tmp_path)
    text = rendered(
        "sweep", [swept(256, preset="imagenet", **gpu)], tmp_path, device="Some GPU", driver="580.1", processor="A host"
    )
    assert text.count("| batch |") == 3
    assert "resnet18 at 32 px, fp32 on 8 processes;" in text
    assert "sweep-cpu-8-processes.png" in text
    last = text[text.index("`imagenet`") :]
    assert "| 1,853 | 70,000 | 98.7 % | 612 W | the model limits |" in last
    assert "\nSome GPU, driver 580.1, A host, threads 4, the loader's 1, load 0.5" in last
    assert "A processor" not in last  # that preset's newest run was on the GPU


def contested(batch_size, what, speed, ratio):
    row = {"preset": "cpu", "batch_size": batch_size, "size": 32, "encoder": "resnet18", "precision": "no"}
    row |= {"world_size": 1, "what": what, "images_per_s": speed, "ratio_to_ours": ratio}
    row |= {"rounds": 5, "ratio_p20": ratio, "ratio_p80": ratio, "status": "ok"}
    return row | {"cpu_ms_per_image": 4e3 / speed, "peak_host_mib": 900, "command": "python -m benchmarks.sweep"}


def test_other_loaders_are_told_beside_ours(tmp_path):
    rows = [contested(256, what, speed, ratio) for what, speed, ratio in (("SwiftCLR", 400, 1), ("lightly", 100, 0.25))]
    rows[1] |= {"ratio_p20": 0.1, "ratio_p80": 0.9, "status": "noisy"}
    numbers = ("images_per_s", "ratio_to_ours", "ratio_p20", "ratio_p80", "cpu_ms_per_image", "peak_host_mib")
    rows.append(contested(256, "solo", 1, 1) | dict.fromkeys(numbers, "") | {"status": "out of memory"})
    assert rendered("against", rows, tmp_path) == (
        "\n`cpu`: resnet18 at 32 px, fp32; the same model and images through other loaders and losses; the "
        "median of 5 rounds' ratios (p20 to p80), and processor time with workers.\n\n"
        "| batch | training with | images/s | of ours | CPU ms per image | host MiB |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| 256 | SwiftCLR | 400 | 1.00 x (1.00 to 1.00) | 10 | 900 |\n"
        "| 256 | lightly | 100 | 0.25 x (0.10 to 0.90, noisy) | 40 | 900 |\n"
        "| 256 | solo | – | out of memory | – | – |\n"
        "\nImages as in the command: `python -m benchmarks.sweep`\n"
        f"\n{LINE}`against.csv`, [plot](records/against-cpu.png)\n\n"
    )


def loaded(what, name, speed, ms):
    row = {"what": what, "implementation": name, "images_per_s": speed, "cpu_ms": ms, "growth_mib": "", "version": ""}
    row |= {"peers_files": ".jpg"}
    return row | {"data": "imagenet-sample, 1000 images", "views": "imagenet", "size": 224, "batch_size": 50}


def test_loaders_and_stages(tmp_path):
    """Two tables; a row without a time, of growing memory, belongs to neither."""
    rows = [loaded("stage", "read", 1000 * n, 0.5) | {"threads": n} for n in (1, 2)]
    rows += [loaded("stage", "blur", 50 * n, 20) | {"threads": n} for n in (1, 2)]
    rows += [loaded("loader", "SwiftCLR", 100, 20) | {"threads": 2}]
    rows += [loaded("loader", "lightly", 50, 38.4) | {"threads": 2, "version": "1.5"}]
    rows += [loaded("memory, 2000 steps", "SwiftCLR", "", "") | {"threads": 2, "growth_mib": 1}]
    append(tmp_path / "loader.csv", [HERE | row for row in rows])  # their own threads
    title = "Two views of 224 px from imagenet-sample, 1000 images, views imagenet, loaders alone"
    assert report.written("loader", tmp_path) == (
        f"\n{title}; the others, but for webdataset, read the same images in class folders: "
        ".jpg.\n\n"
        "| loader | images/s | CPU ms per image | of ours |\n| --- | --- | --- | --- |\n"
        "| SwiftCLR | 100 | 20 | 1.00 x |\n| lightly 1.5 | 50 | 38.4 | 1.92 x |\n"
        f"\n{title}, by stages (the last stands alone): images/s, CPU ms per image.\n\n"
        "| stage, with those above | 1 thread | 2 threads |\n| --- | --- | --- |\n"
        "| read | 1,000, 0.5 ms | 2,000, 0.5 ms |\n| blur | 50, 20 ms | 100, 20 ms |\n"
        f"\n{LINE.replace('threads 4', 'threads 1, 2')}`loader.csv`, "
        "[plot](records/loader-cpu-224.png)\n\n"
    )


def lost(rows, name, ms, mib, mode="forward+backward"):
    row = {"what": "nt_xent", "implementation": name, "mode": mode, "rows": rows, "dim": 128, "temperature": 0.1}
    return row | {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "runs": 5, "peak_mib": mib}


def test_a_rerun_replaces_all_that_was_measured_together(tmp_path):
    """Ratios hold within one run only, so no line mixes two: the peer that was not measured again is gone from it."""
    old = [lost(512, "chunked", 9, 9), lost(512, "lightly", 90, 90), lost(1024, "chunked", 20, 5)]
    rendered("loss", [*old, lost(1024, "lightly", 200, 50)], tmp_path, load="7.5")
    new = [lost(512, "chunked", 3.14159, 3), lost(512, "chunked", 1, 1, "forward"), lost(512, "limit: exp", 1, "")]
    assert rendered("loss", new, tmp_path) == (
        "\nNT-Xent, forward and backward: milliseconds, and MiB at the peak; compare within a line.\n\n"
        "| rows | chunked | lightly | load |\n| --- | --- | --- | --- |\n"
        "| 512 | 3.14 ms, 3 MiB | – | 0.5 |\n| 1024 | 20 ms, 5 MiB | 200 ms, 50 MiB | 7.5 |\n"
        f"\n{LINE.replace('load 0.5', 'load 0.5 to 7.5')}`loss.csv`, "
        "[plot](records/loss-cpu-4-threads.png)\n\n"
    )


def test_the_loss_is_told_with_the_most_threads(tmp_path):
    rendered("loss", [lost(512, "chunked", 9, 9)], tmp_path)
    text = rendered("loss", [lost(512, "chunked", 30, 9)], tmp_path, threads="1")
    assert "| 512 | 9 ms, 9 MiB | 0.5 |" in text
    assert "30 ms" not in text


def test_the_step_is_its_fastest_kind(tmp_path):
    rows = []
    for layout, precision, ms in (("nchw", "fp32", 200), ("nhwc", "fp32", 150), ("nhwc", "bf16", 100)):
        row = {"what": "step", "depth": 18, "width": 1.0, "size": 32, "images": 64, "world_size": 1, "layout": layout}
        row |= {"mode": "eager", "precision": precision, "bn": "local", "median_ms": ms, "forward_ms": 30.5}
        row |= {"loss_ms": 1.25, "backward_ms": 60, "optimizer_ms": 8, "views_per_s": 128e3 / ms}
        rows.append(row | {"peak_extra_mib": 512.5, "mfu": 0.2})
    head = "| network | images | fastest | ms | forward | loss | backward | LARS | views/s | MiB | mfu |\n"
    assert rendered("step", rows, tmp_path) == (
        "\nThe step alone, on synthetic views: the fastest layout and mode of each precision.\n\n"
        + head
        + "| --- " * 11
        + "|\n| ResNet-18, 32 px | 64 | fp32, nhwc, eager | 150 | 30.5 | 1.25 | 60 | 8 | 853 | 512 | 0.2 |\n"
        "| ResNet-18, 32 px | 64 | bf16, nhwc, eager | 100 | 30.5 | 1.25 | 60 | 8 | 1,280 | 512 | 0.2 |\n"
        f"\n{LINE}`step.csv`\n\n"
    )


def test_lars_is_told_with_its_calls(tmp_path):
    rows = [
        {"what": "lars", "implementation": name, "size": size, "depth": 50, "params": 161, "median_ms": ms}
        | {"calls": calls, "waits": 0, "kernels": ""}
        for name, size, ms, calls in (
            ("ours, 2 parameters", "host", 0.1, 20),
            ("ours", "host", 1, 20),
            ("timm", "host", 8, 1295),
            ("ours", "real", 40, 20),
            ("timm", "real", 60, 1295),
        )
    ]
    assert rendered("lars", rows, tmp_path) == (
        "\nOne step on ResNet-50 and its head: issued to parameters of a few numbers (host), and in full.\n\n"
        "| optimizer | host ms | ms | of ours | calls | waits |\n| --- | --- | --- | --- | --- | --- |\n"
        "| ours, 2 parameters | 0.1 | – | – | 20 | 0 |\n| ours | 1 | 40 | 1.00 x | 20 | 0 |\n"
        "| timm | 8 | 60 | 1.50 x | 1295 | 0 |\n"
        f"\n{LINE}`lars.csv`\n\n"
    )


def test_a_run_is_told_by_its_first_and_last_evaluation(tmp_path):
    facts = {"run": "tiny", "command": "train.py demo", "batch_size": 8, "images_per_s_median": 424.2}
    facts |= {"data_wait_percent_median": 1.44, "peak_mib": 1852.9}
    rows = [
        facts | {"step": s, "knn_top1": k, "training_s": t} for s, k, t in ((0, 0.2, 0), (5, 0.3, 60), (9, 0.5123, 150))
    ]
    rows.append(facts | {"run": "fast", "step": 7, "knn_top1": "", "training_s": 5})
    assert rendered("training", rows, tmp_path) == (
        "\n| run | kNN accuracy | images/s | data_wait | peak MiB |\n| --- | --- | --- | --- | --- |\n"
        "| tiny | 20.0 % at random initialisation, 51.2 % after 2 min, 9 steps | 424 | 1.44 % | 1,853 |\n"
        "| fast | – | 424 | 1.44 % | 1,853 |\n"
        f"\ntiny: `train.py demo`\n\n{LINE}`training.csv`, [plot](records/training-tiny.png)\n"
        f"\nfast: `train.py demo`\n\n{LINE}`training.csv`, [plot](records/training-fast.png)\n\n"
    )


def test_the_demo_is_quoted_as_it_ran(tmp_path):
    row = {
        "what": "demo",
        "first_line": "step 0/2 | kNN 10 %",
        "log_line": "step 1/2 | loss 5",
        "last_line": "kNN 70 %",
    }
    text = rendered("demo", [row | {"wall_s": 92.4, "pixels_knn": 0.538, "installed_gib": 5.1}], tmp_path)
    assert text.startswith("\n```\nstep 0/2 | kNN 10 %\nstep 1/2 | loss 5\n...\nencoder ")
    assert "\nkNN 70 %\n```\n\nIt took 92.4 s. " in text
    assert "pixels already gives 53.8 %. The installed packages take 5.1 GiB" in text


# ---- the file

PAGE = (
    "before\n\n<!-- report:against -->\nold\n<!-- /report -->\n\nbetween `5 ms`\n\n"
    "<!-- report:lars -->\n<!-- /report -->\nafter\n"
)


@pytest.fixture
def page(tmp_path):
    """(a function that runs the program, the README) beside one record."""
    append(tmp_path / "against.csv", [contested(256, "lightly", 100, 0.25) | HERE])
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    app = typer.Typer()
    app.command()(report.main)
    where = ["--readme", str(readme), "--records", str(tmp_path)]
    return lambda *arguments: CliRunner().invoke(app, [*where, *arguments]), readme


def test_blocks_are_filled_once_and_nothing_else_is_touched(page):
    run, readme = page
    assert run().exit_code == 0
    text = readme.read_text()
    assert re.sub(r"against -->\n.*?<!-- /", "against -->\nold\n<!-- /", text, count=1, flags=re.DOTALL) == PAGE
    assert "| 256 | lightly | 100 | 0.25 x (0.25 to 0.25) | 40 | 900 |" in text
    assert run().exit_code == 0
    assert readme.read_text() == text


def test_the_check_finds_a_changed_number_and_changes_nothing(page):
    run, readme = page
    assert run("--check").exit_code == 1
    assert readme.read_text() == PAGE
    run()
    assert run("--check").exit_code == 0
    readme.write_text(readme.read_text().replace("| 100 |", "| 101 |"))
    done = run("--check")
    assert done.exit_code == 1
    assert "101" in done.output
    assert "| 100 |" in done.output


def test_the_check_finds_a_new_record(page, tmp_path):
    run, readme = page
    run()
    with open(tmp_path / "against.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    append(tmp_path / "against.csv", [row | {"images_per_s": 105}])
    assert run("--check").exit_code == 1


@pytest.mark.parametrize("number", ["took 92 s.", "98.5 % of it", "1,024 MiB", "400 images/s", "5ms", "about 6 GB"])
def test_a_number_without_a_record_is_found(page, number):
    run, readme = page
    run()
    readme.write_text(readme.read_text().replace("after", f"It is {number}"))
    done = run("--check")
    assert done.exit_code == 1
    assert "comes from no record" in done.output


def test_a_plot_that_is_linked_must_be_there(tmp_path):
    """And the link leads there from where the file lies."""
    append(tmp_path / "records" / "sweep.csv", [swept(256) | HERE])
    page = tmp_path / "README.md"
    page.write_text(report.filled("<!-- report:sweep -->\n<!-- /report -->", tmp_path / "records", tmp_path))
    assert "[plot](records/sweep-cpu.png)" in page.read_text()
    assert ["sweep-cpu.png" in fault for fault in report.faults(page, tmp_path / "records")] == [True]
    (tmp_path / "records" / "sweep-cpu.png").touch()
    assert report.faults(page, tmp_path / "records") == []
    above = report.filled("<!-- report:sweep -->\n<!-- /report -->", tmp_path / "records", tmp_path.parent)
    assert f"[plot]({tmp_path.name}/records/sweep-cpu.png)" in above


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("<!-- report:speed -->\n<!-- /report -->", "speed"),
        ("<!-- report:lars -->\n", "does not end"),
        ("<!-- report:lars -->\nkeep this\n<!-- report:step -->\n<!-- /report -->", "does not end"),
        ("<!-- /report -->", "does not begin"),
    ],
)
def test_broken_markers_are_refused_and_nothing_is_lost(page, text, named):
    run, readme = page
    readme.write_text(text)
    done = run()
    assert done.exit_code == 2
    assert named in " ".join(done.output.replace("│", " ").split())
    assert readme.read_text() == text


def test_the_plot_of_a_sweep_shows_its_numbers(tmp_path, monkeypatch):
    """Throughput, memory and stall; what was out of memory is a gap."""
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    noisy = {"status": "noisy", "ratio": 0.75}
    rows = [swept(n, **c) | HERE for n, c in ((256, {}), (512, NOTHING), (1024, noisy))]
    sweep.plots([{key: str(value) for key, value in row.items()} for row in rows], tmp_path)
    lines = {line.get_label(): list(line.get_ydata())[:1] for axes in drawn[0].axes for line in axes.lines}
    assert lines == {
        "loader alone": [1234.5],
        "step alone, synthetic views": [400],
        "both together": [396],
        "host": [1852.9],
        "time waiting for images": [1.25],
        "median of the rounds": [0.99],
        "noisy: no verdict": [0.75],
        "0.97: from here on the model limits": [0.97],
    }
    measured = [line for axes in drawn[0].axes for line in axes.lines if len(line.get_ydata()) == 3]
    assert all(str(line.get_ydata()[1]) == "nan" for line in measured)
    assert (tmp_path / "sweep-cpu.png").stat().st_size > 10_000


def test_the_plot_of_rivals_shows_each_batch(tmp_path, monkeypatch):
    """A bar per contestant and batch, as long as its images per second, and its ratio to ours written on it."""
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    rows = [contested(n, "SwiftCLR", 400, 1) for n in (256, 512)]
    rows += [contested(256, "lightly", 100, 0.25) | {"status": "noisy"}]
    against.plots([{key: str(value) for key, value in (row | HERE).items()} for row in rows], tmp_path)
    (axes,) = drawn[0].axes
    named = [label.get_text() for label in axes.get_yticklabels()]
    told = [text.get_text().strip() for text in axes.texts]
    assert list(zip(named, [bar.get_width() for bar in axes.patches], told, strict=True)) == [
        ("SwiftCLR, batch 256", 400, "400, 1.00 x"),
        ("lightly, batch 256", 100, "100, 0.25 x, noisy"),
        ("SwiftCLR, batch 512", 400, "400, 1.00 x"),
    ]


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.parent.name)
def test_the_readmes_say_what_the_records_say(page):
    """After measuring: python -m benchmarks.report."""
    assert report.faults(page, report.RECORDS) == []


def test_every_record_has_a_block_in_a_readme():
    """And every block but the headlines has a record; what nothing shows is kernels' registers and shapes."""
    blocks = [name for page in report.PAGES for _, name, _, _ in report.BLOCK.findall(page.read_text())]
    recorded = {path.stem for path in report.RECORDS.glob("*.csv")} - {"loss_kernels", "loss_tune"}
    assert sorted(blocks) == sorted({*recorded, "headlines"}) == sorted({*report.BLOCKS, "headlines"})


def test_headlines_have_their_conditions(tmp_path):
    """A ratio of rates, of processor times and of times, each under the conditions of the rows that it is of."""
    for name, rows in {
        "sweep": [swept(256), swept(512, ratio=1.01), swept(256, preset="cpu-tiny")],
        "loader": [loaded("loader", "SwiftCLR", 100, 20), loaded("loader", "torchvision, PIL", 50, 50)],
        "loss": [lost(n, name, ms, 9) for n in (512, 1024) for name, ms in (("chunked", n), ("lightly", 4 * n))],
    }.items():
        append(tmp_path / f"{name}.csv", [row | HERE for row in rows])
    assert report.written("headlines", tmp_path).splitlines() == [
        "",
        "- Training runs at 0.990 to 1.010 of the rate of its steps on synthetic views, at batches of 256 to 512 "
        "images (resnet18 at 32 px, fp32).",
        f"  {LINE.replace('threads 4', f'threads 4, the loader{chr(39)}s 1')}`sweep.csv`",
        "- Two views of 224 px take 20 ms of processor time per image; torchvision's transforms take 50 ms, "
        "2.50 x as much.",
        f"  {LINE}`loader.csv`",
        "- NT-Xent of 1024 rows, forward and backward, takes 1,024 ms and 9 MiB; lightly's takes 4,096 ms and 9 MiB: "
        "4.00 x the time.",
        f"  {LINE}`loss.csv`",
        "",
    ]


def test_a_table_is_of_one_clean_commit_if_one_measured_it_all():
    """Not of a newer one that measured a part of it, nor of one with changed files."""
    rows = [
        {"commit": commit, "batch": batch}
        for commit, batch in (("a", "1"), ("a", "2"), ("b", "1"), ("b", "2"), ("c", "1"), ("d+", "1"), ("d+", "2"))
    ]
    assert of_one_commit(rows, "batch") == rows[2:4]
    assert of_one_commit(rows[4:], "batch") == rows[4:]


def test_reproduced_results_are_means_over_the_seeds_beside_what_is_published(tmp_path):
    """0.50, 0.52 and 0.54 are 52.0 with a standard deviation of 2.0; an older row of another run's time is left out."""
    rows = [
        {"run": "small", "seed": seed, "data": "a, b", "encoder": "ResNet-18, width 0.25", "batch_size": 256}
        | {"epochs": 10, "training_s": 300 + 60 * seed, "percent": 1, "finetune": 0.4, "scratch": 0.3, "knn": knn}
        | {"knn_random": 0.2, "logistic": 0.6, "logistic_random": 0.25, "published": "84.8 %, somebody"}
        | {"command": f"train.py cifar10 --seed {seed}"}
        for seed, knn in enumerate((0.50, 0.52, 0.54))
    ]
    rendered("reproduction", rows[:1], tmp_path, load="9")
    assert rendered("reproduction", rows, tmp_path) == (
        "\n| run | encoder | training | seeds | kNN (random weights) | logistic (random weights) "
        "| fine-tuned (from scratch) | on | published |\n" + "| --- " * 9 + "|\n"
        "| small | ResNet-18, width 0.25, batch 256, 10 epochs | 6 min | 3 | 52.0 ± 2.0 % (20.0 ± 0.0 %) "
        "| 60.0 ± 0.0 % (25.0 ± 0.0 %) | 40.0 ± 0.0 % (30.0 ± 0.0 %) | 1 % of the labels | 84.8 %, somebody |\n"
        f"\nsmall: `train.py cifar10 --seed 0`\n\n{LINE}`reproduction.csv`\n\n"
    )


def test_an_ablation_is_a_line_per_cell_the_best_first(tmp_path):
    rows = [
        {
            "grid": "head",
            "cell": cell,
            "seed": seed,
            "knn": 0.4,
            "logistic": score + 0.02 * seed,
            "loss": 1,
            "seconds": 9,
        }
        | {"settings": "cifar10 --epochs 8", "data": "small, 100 images"}
        for cell, score in (("head=none", 0.41), ("head=linear", 0.43), ("random", 0.2))
        for seed in (range(2) if cell != "random" else range(1))
    ]
    assert rendered("ablation", rows, tmp_path) == (
        "\n`tools/ablate.py head` on small, 100 images, `cifar10 --epochs 8`:\n\n"
        "| cell | seeds | logistic | kNN |\n| --- | --- | --- | --- |\n"
        "| head=linear | 2 | 44.0 ± 1.4 % | 40.0 ± 0.0 % |\n| head=none | 2 | 42.0 ± 1.4 % | 40.0 ± 0.0 % |\n"
        f"| random | 1 | 20.0 % | 40.0 % |\n\n{LINE}`ablation.csv`, [plot](records/ablation-head.png)\n\n"
    )
