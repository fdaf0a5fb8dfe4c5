"""`vitscale fit` as it is called, on files as people have them."""

import json

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from orchestrator.tracking import connect
from pipelines.cli import app
from workers.errors import ConfigError, DataError

SVG = {"x": 12.5, "y": 99.0, "color": "#faebdd"}
"""Columns of Epoch AI's extraction that are places in a picture, not sizes or losses."""
JOINT = "chinchilla"


def fit(*arguments):
    """What it printed; errors as raised."""
    done = CliRunner().invoke(app, ["fit", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def write(path, rows):
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pyarrow.parquet.write_table(table, path)
    return path


def learning_curves(seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "domain": "IC",
            "task": task,
            "model": model,
            "seen_examples": x,
            "loss": (e + 0.3 * (x / 1e9) ** -0.4) * np.exp(rng.normal(0, 0.01)),
            "split": "fit" if x <= 1e9 else "extrapolate",
        }
        for task, e in (("birds", 0.05), ("cars", 0.1))
        for model in ("ViT", "BiT")
        for x in np.geomspace(1e7, 2e9, 40)
    ]


def runs(seed=0):
    rng = np.random.default_rng(seed)
    flops = np.repeat(np.geomspace(6e18, 3e21, 9), 10)
    size = np.sqrt(flops / 120) * np.exp(rng.uniform(-1.5, 1.5, len(flops)))
    loss = 1.8 + 480 * size**-0.35 + 2100 * (flops / 6 / size) ** -0.37
    loss *= np.exp(rng.laplace(0, 0.003, len(flops)))
    loss[:3] *= 2
    rows = zip(size, flops, loss, strict=True)
    return [{**SVG, "Model Size": n, "Training FLOP": c, "loss": y} for n, c, y in rows]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_curves_with_a_split_are_found_by_their_names(tmp_path, kind):
    path = write(tmp_path / f"curves.{kind}", learning_curves())
    found = json.loads(fit(path, "--backtest", "--json"))
    assert [one["curve"] for one in found["curves"]] == ["birds ViT", "birds BiT", "cars ViT", "cars BiT"]
    assert (found["x"], found["y"]) == ("seen_examples", "loss")
    for one in found["curves"]:
        assert one["parameters"].keys() == one["standard_errors"].keys() >= {"P.e", "P.k", "L.k"}
        assert [point["x"] / one["x_range"][1] for point in one["predictions"]] == [2, 4]
        assert all(point["low"] < point["median"] < point["high"] for point in one["predictions"])
    held = {one["estimator"]: one for one in found["backtest"]["held out"]["estimators"]}
    assert held["ensemble"]["rmsle"] < held["last value"]["rmsle"] / 3
    assert held["ensemble"]["nominal"] == 0.9 and held["ensemble"]["coverage"] > 0.8
    assert sum(one["share_won"] for one in held.values()) == pytest.approx(1)


def test_tables_plots_and_forecasts_are_written(tmp_path):
    path = write(tmp_path / "curves.csv", learning_curves())
    said = fit(path, "--plot", tmp_path / "c.svg", "--out", tmp_path / "f.parquet", "--backtest")
    assert "birds ViT" in said and "coverage" in said and "last octave" in said
    assert (tmp_path / "c.svg").read_text().count("birds ViT") == 1
    assert len(pyarrow.parquet.read_table(tmp_path / "f.parquet")) == 8


def test_chinchilla_from_a_file_as_epoch_has_it(tmp_path):
    path = write(tmp_path / "svg_extracted_data.csv", runs())
    options = ("--law", "chinchilla", "--exclude-largest", 3, "--bootstraps", 30)
    found = json.loads(fit(path, *options, "--budget", "1e22", "--json", "--plot", tmp_path / "r.png"))
    assert (found["rows"], found["runs"]) == (90, 87)
    assert len(found["excluded"]) == 3 and min(found["excluded"]) > 4
    assert (found["size"], found["data"], found["y"]) == ("Model Size", "Training FLOP", "loss")
    assert found["parameters"]["alpha"] == pytest.approx(0.35, abs=0.05)
    assert found["standard_errors"].keys() == {"A", "B", "E", "alpha", "beta"}
    bought = found["predictions"][0]
    assert 6 * bought["size"] * bought["data"] == pytest.approx(1e22)
    assert "3 largest losses of 90 are left out" in fit(path, *options, "--backtest")


def test_a_run_exported_twice_counts_once(tmp_path):
    rows = [row | {"seed": number % 2} for number, row in enumerate(runs())]
    options = ("--law", "chinchilla", "--bootstraps", 20, "--json")
    once = json.loads(fit(write(tmp_path / "once.csv", rows), *options))
    twice = json.loads(fit(write(tmp_path / "twice.csv", [*rows, *rows]), *options))
    assert any("90 exact copies of runs left out" in note for note in twice["notes"])
    assert twice["parameters"] == once["parameters"] and twice["standard_errors"] == once["standard_errors"]


def test_it_is_told_where_a_law_in_size_and_data_looks_the_wrong_way(tmp_path):
    rows = [row | {"loss": row["loss"] * (row["Model Size"] / 1e9) ** 0.5} for row in runs()]
    path = write(tmp_path / "overfit.csv", rows)
    assert "rise with size" in " ".join(fit(path, "--law", "chinchilla", "--bootstraps", 20).split())
    assert "rise with" not in fit(
        write(tmp_path / "r.csv", runs()), "--law", "chinchilla", "--bootstraps", 20
    )


def test_columns_by_name_and_in_lower_case(tmp_path):
    rows = [
        {"n": row["Model Size"], "d": row["Training FLOP"] / 6 / row["Model Size"], "l": row["loss"]}
        for row in runs()
    ]
    path = write(tmp_path / "runs.csv", rows)
    options = ("--law", "chinchilla", "--y", "L", "--bootstraps", 20, "--exclude-largest", 3, "--json")
    found = json.loads(fit(path, *options))
    assert (found["size"], found["data"]) == ("n", "d")
    assert found == json.loads(fit(path, *options, "--size", "n", "--data", "d"))


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"x": 1, "loss": 2.0}] * 3, (), "all points are at x = 1"),
        ([{"x": x, "loss": 1 / x} for x in (1, 2, 3)], (), "3 different x"),
        ([{"x": x, "loss": 1 / x if x != 3 else float("nan")} for x in range(1, 9)], (), "row 3 is nan"),
        ([{"x": x, "loss": 5.0 - x} for x in range(1, 9)], (), "row 5 is 0"),
        ([{"x": x, "loss": f"{x}?"} for x in range(1, 9)], (), "'1?', not a number"),
        ([{"x": x, "top1": x / 10} for x in range(1, 9)], (), "--y top1 --accuracy"),
        ([{"x": x, "top1": x / 10} for x in range(1, 9)], ("--y", "top1"), "its name says accuracy"),
        ([{"x": x, "score": x / 10} for x in range(1, 9)], ("--y", "score"), "rise with x, as accuracy does"),
        ([{"x": x, "loss": 1 / x} for x in range(1, 9)], ("--x", "steps"), "no such column; it has x, loss"),
        ([{"x": x, "loss": 1 / x} for x in range(1, 9)], ("--predict", "99"), "12.4 times the largest x"),
        ([{"x": x, "loss": 1 / x} for x in range(1, 9)], ("--law", "m9"), "expected one of ensemble"),
        ([{"x": x, "loss": 1 / x} for x in range(1, 9)], ("--plot", "a.pdf"), ".svg or .png"),
        ([{"n": 7, "d": x, "loss": 1 / x} for x in range(1, 19)], ("--law", JOINT), "1 different value in"),
        ([{"size": x, "loss": 1 / x} for x in range(1, 19)], ("--law", JOINT), "--data, --flops"),
    ],
)  # fmt: skip
def test_bad_input_is_told_plainly(tmp_path, rows, options, said):
    path = write(tmp_path / "points.csv", rows)
    with pytest.raises((ConfigError, DataError)) as caught:
        fit(path, *options)
    assert said in str(caught.value)


def test_a_forecast_too_far_needs_to_be_asked_for_and_says_so(tmp_path):
    path = write(tmp_path / "points.csv", [{"x": x, "loss": 0.1 + 1 / x} for x in range(1, 30)])
    found = json.loads(fit(path, "--predict", 1000, "--extrapolate", "--json"))
    assert found["curves"][0]["predictions"][0]["beyond_backtests"] is True
    assert "never tried so far out" in fit(path, "--predict", 1000, "--extrapolate")


def test_one_bad_curve_does_not_hide_the_others(tmp_path):
    rows = [*learning_curves(), *({"task": "few", "model": "ViT", "seen_examples": 1e7, "loss": 0.5},) * 2]
    found = json.loads(
        fit(write(tmp_path / "points.parquet", [{**learning_curves()[0], **row} for row in rows]), "--json")
    )
    assert len(found["curves"]) == 4
    assert "at least 4 scales" in found["refused"]["few ViT"]


def test_names_are_shown_as_they_are(tmp_path):
    names = {"birds": "[/INST]", "cars": "[unk]"}
    rows = [{**row, "task": names[row["task"]]} for row in learning_curves()]
    said = fit(write(tmp_path / "points.csv", rows))
    assert "[/INST]" in said and "[unk]" in said


def test_accuracy_becomes_error_and_missing_cells_are_told(tmp_path):
    rows = [{"images_seen": x, "top1": 100 - 40 * x**-0.3} for x in np.geomspace(1, 100, 20)]
    rows[4]["top1"] = None
    found = json.loads(fit(write(tmp_path / "p.csv", rows), "--y", "top1", "--accuracy", "--json"))
    assert found["notes"] == ["1 rows have no top1 and are left out", "error = 1 - top1 / 100"]
    forecast = found["curves"][0]["predictions"][0]
    assert forecast["low"] < 0.4 * 200**-0.3 < forecast["high"]


def test_a_studys_own_points_are_taken_at_the_ends_of_schedules(tmp_path):
    rows = [
        {"family": family, "size": "xs", "images_seen": x, "loss": y, "end": end, "selected": True}
        for family in ("vit", "resnet")
        for x in (1e3, 2e3, 4e3, 8e3, 16e3)
        for y, end in ((0.1 + x**-0.2, True), (3.0, False))
    ]
    found = json.loads(fit(write(tmp_path / "points.parquet", rows), "--json"))
    assert [one["curve"] for one in found["curves"]] == ["vit", "resnet"]
    assert found["x"] == "images_seen" and "10 rows within a schedule" in found["notes"][0]


def test_break_even_of_families_on_every_task(tmp_path):
    path = write(tmp_path / "curves.csv", learning_curves())
    found = json.loads(fit(path, "--break-even", "ViT,BiT", "--json"))["break_even"]
    assert [(one["first"], one["second"]) for one in found] == [
        ("birds ViT", "birds BiT"),
        ("cars ViT", "cars BiT"),
    ]
    assert all(0 <= one["never"] <= 1 and one["sentence"] for one in found)
    with pytest.raises(ConfigError, match="no two curves differ in these words alone"):
        fit(path, "--break-even", "ViT,MLP")


def test_break_even_has_a_panel_of_its_own_in_the_plot(tmp_path):
    path = write(tmp_path / "curves.csv", learning_curves())
    fit(path, "--break-even", "ViT,BiT", "--plot", tmp_path / "c.svg")
    drawn = (tmp_path / "c.svg").read_text()
    assert drawn.count("break-even; none: ") == 2
    assert drawn.count("birds ViT") == 2  # its own panel's title, the other's legend


def test_a_curve_too_short_to_be_halved_is_tried_without_its_largest_x(tmp_path):
    rows = [{"x": x, "loss": 0.1 + 1 / x} for x in (10, 11, 12, 13, 14)]
    found = json.loads(fit(write(tmp_path / "points.csv", rows), "--backtest", "--json"))["backtest"]
    assert found.keys() == {"largest x left out"}
    assert found["largest x left out"]["tasks"] == 1


def star(noise=0.003):
    """A star sweep with a centre of 384 wide and 6 deep, as a study's points are."""
    rng = np.random.default_rng(1)
    arms = [(width, 6) for width in (192, 288, 384, 576, 768, 1152)] + [(384, depth) for depth in (3, 12)]
    return [
        {"width": width, "depth": depth, "mlp": 1536, "total_flops": t, "end": True, "selected": True}
        | {"error": float(star_loss(width, t) * np.exp(rng.normal(0, noise)) * (1 + abs(depth - 6) / 20))}
        for width, depth in arms
        for t in np.geomspace(1e15, 1e18, 8)
    ]


def star_loss(width, flops):
    x, t = width / 400, flops / 3e16
    return 0.3 * x**-0.5 + (0.15 * x**0.6 + 0.2) * t**-0.3 + 0.1


def test_the_best_width_of_a_budget_from_a_star_sweep(tmp_path):
    path = write(tmp_path / "points.parquet", star())
    options = ("--law", "shape", "--size", "width", "--bootstraps", 60, "--budget", "1e17", "--backtest")
    found = json.loads(fit(path, *options, "--json", "--plot", tmp_path / "w.svg"))
    assert (found["shape"], found["flops"], found["y"]) == ("width", "total_flops", "error")
    assert found["runs"] == 48 and "16 rows that are not of depth 6, mlp 1536" in found["notes"][0]
    widths = np.geomspace(100, 10_000, 4000)
    truth = widths[star_loss(widths, 1e17).argmin()]
    best = found["predictions"][0]
    assert best["low"] < truth < best["high"] and best["low"] < best["best"] < best["high"]
    assert found["parameters"]["s"] == pytest.approx(0.3 / 1.1, abs=3 * found["standard_errors"]["s"] + 0.01)
    score = found["backtest"][0]
    assert score["later"] > 0 and score["rmsle"] < score["naive"] / 3
    assert "best value" in (tmp_path / "w.svg").read_text()
    assert "grows as t^s" in fit(path, *options)


def test_a_shape_that_always_helps_has_no_best_value(tmp_path):
    rows = [row | {"error": 0.1 + 30 / row["width"] + row["total_flops"] ** -0.1} for row in star()]
    path = write(tmp_path / "points.csv", [row for row in rows if row["depth"] == 6])
    found = json.loads(fit(path, "--law", "shape", "--size", "width", "--bootstraps", 20, "--json"))
    assert all(one["best"] is None or one["best"] > 1152 for one in found["predictions"])
    assert all(one["inside"] == 0 for one in found["predictions"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--size", "depth"), "different value"),
        ((), "name the dimension's column"),
        (("--size", "width", "--budget", "1e20"), "--extrapolate"),
    ],
)
def test_what_a_star_cannot_say_is_refused(tmp_path, options, said):
    path = write(tmp_path / "points.parquet", star())
    with pytest.raises((ConfigError, DataError), match=said):
        fit(path, "--law", "shape", *options)


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own
def test_an_mlflow_experiment_is_read(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    experiment = client.create_experiment("pretrain")
    for x, status in (
        (1e3, "FINISHED"),
        (2e3, "FINISHED"),
        (4e3, "FINISHED"),
        (8e3, "FINISHED"),
        (9e3, "FAILED"),
    ):
        run = client.create_run(experiment, tags={"vitscale.run": f"a-{x:.0f}"}).info.run_id
        client.log_param(run, "model.size", "ti")
        client.log_metric(run, "images_seen", x)
        client.log_metric(run, "val_loss", 0.1 + 50 / x)
        client.set_terminated(run, status)
    site = tmp_path / "site.yaml"
    services = {
        "ray": "http://127.0.0.1:1",
        "mlflow": uri,
        "data": tmp_path.as_uri(),
        "runs": tmp_path.as_uri(),
    }
    site.write_text(json.dumps(services))
    found = json.loads(
        fit("mlflow:pretrain", "--y", "val_loss", "--curve", "model.size", "--site", site, "--json")
    )
    assert [(one["curve"], one["points"]) for one in found["curves"]] == [("ti", 4)]
    with pytest.raises(ConfigError, match=r"no experiment nowhere; it has .*pretrain"):
        fit("mlflow:nowhere", "--site", site)


def test_the_frontier_is_what_compute_bought_and_rows_can_be_left_out(tmp_path):
    rows = [
        {"model": model, "train_flops": c * factor, "error": (0.1 + 0.5 * (c + 0.5) ** -0.3) * factor**0.05}
        for model, factor in (("good", 1.0), ("bad", 3.0), ("cheat", 0.01))
        for c in np.geomspace(1, 1e4, 20)
    ]
    path = write(tmp_path / "runs.parquet", rows)
    found = json.loads(
        fit(path, "--law", "frontier", "--exclude", "model=cheat", "--predict", "5e4", "--json")
    )
    assert found["notes"] == [
        "20 rows of model=cheat are left out",
        "20 of 40 runs are better than every cheaper one",
    ]
    forecast = found["curves"][0]["predictions"][0]
    assert forecast["low"] < 0.1 + 0.5 * 5e4**-0.3 < forecast["high"]
