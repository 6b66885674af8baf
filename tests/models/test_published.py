"""The recipe `published`: its models, the forms of attention it alone reaches, its training fault,
and its figures beside the published ones."""

import csv
import math
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file
from torch.nn import functional as F

from tab.compare.driver import compare
from tab.compare.plan import Grid, Plan
from tab.compare.runs import Run
from tab.data.load import load_dataset
from tab.data.splits import splits
from tab.layers import attention_names, attention_options, build_attention, get_attention
from tab.models.image_model import build_model
from tab.recipe.published import EPOCHS, curves, published_attentions
from tab.recipe.recipe import load_recipe
from tab.recipe.size_matching import parameters_of
from tab.report.published import beside, published_charts, published_picture, published_section
from tab.train import checkpoint
from tab.train.loop import train
from tab.train.steps import Steps

N, C, H = 12, 32, 4
D = C // H
OPTIONS = {
    "linear": {"kernel_size": 6},
    "performer": {"num_features": 8},
    "linformer": {"k": 5, "max_seq_len": 16},
    "sparse": {"block_size": 4},
    "local": {"window_size": 4},
    "kv_compression": {"compression_ratio": 0.5},
}
FORMS = [a for a in published_attentions() if a not in ("none", "self")]


def layer_of(name, **options):
    torch.manual_seed(0)
    given = {"num_heads": H, **OPTIONS.get(name, {}), **options}
    return build_attention(name, C, seq_len=N, published=True, **given).double().eval()


def tokens(generator, count=N):
    return torch.randn(2, count, C, generator=generator, dtype=torch.float64)


# --- the recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "attention", "width", "parameters"),
    [
        ("mlp", "none", 512, 3072 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10),
        ("mlp", "multi_head", 256, 3072 * 256 + 256 + 4 * 256**2 + 256 * 257 + 2570),
        ("mlp", "self", 256, 3072 * 256 + 256 + 3 * 256**2 + 256 * 257 + 2570),
        ("cnn", "none", 512, 27 * 128 + 256 + 9 * 128 * 512 + 1024 + 5130),
        ("cnn", "local", 512, 27 * 128 + 256 + 9 * 128 * 512 + 1024 + 5130 + 4 * 512**2),
        ("cnn", "linformer", 512, 599690 + 4 * 512**2 + 2 * 512 * 64),
        ("cnn", "kimi_k2", 256, 152394 + 4 * 256**2 + 256 * 32),
        ("cnn", "linear", 256, 152394 + 4 * 256**2 + 2 * 64 * 128),
    ],
)
def test_models_have_the_published_sizes(model, attention, width, parameters):
    config = load_recipe("published").run_config(model, attention, 0)
    assert config.model_options.hidden == width
    assert parameters_of(config) == parameters


def test_training_is_as_published():
    config = load_recipe("published").run_config("cnn", "performer", 0)
    train, data = config.train, config.data
    assert (train.lr, train.weight_decay, train.batch_size, train.epochs) == (1e-3, 0.01, 512, 100)
    assert (train.schedule, train.label_smoothing, train.amp) == ("constant", 0.0, False)
    assert (data.images, data.validation, data.translate, data.flip) == (0, 0, 0, False)
    assert data.drop_last and config.evaluate.split == "test"
    assert config.attention_options == {"num_heads": 8, "num_features": 64, "seed": 0}
    assert config.model_options.channels == config.model_options.hidden // 4 == 128


def test_each_set_is_normalised_by_its_own_statistics():
    dataset = load_dataset("shapes:120/40")
    options = {"train.batch_size": 50, "evaluate.batch_size": 40}
    config = load_recipe("published", options).run_config("mlp", "none", 0)
    batches, validation, test = splits(config, dataset, torch.device("cpu"))
    assert validation is None and batches.samples == 100  # the incomplete third batch is dropped
    x, _ = next(test.epoch(0))
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_batch_norm_stands_still_after_the_first_epoch(tmp_path):
    dataset = load_dataset("shapes:60/20")
    small = {"train.batch_size": 20, "model.cnn.hidden": 8, "model.cnn.channels": 4}
    config = load_recipe("published", {**small, "train.epochs": 3}).run_config(
        "cnn", "multi_head", 0
    )
    seen = []

    def look(row):
        state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["model"]
        seen.append({k: v.clone() for k, v in state.items() if "running" in k or "1.weight" in k})

    train(config, dataset, tmp_path / "run", on_epoch=look, stop_after=2)
    train(config, dataset, tmp_path / "unbroken", stop_after=2)
    one, two = seen
    means = [k for k in one if "running_mean" in k]
    assert means and all(torch.equal(one[k], two[k]) for k in means)
    assert any(not torch.equal(one[k], two[k]) for k in one if k.endswith("weight"))
    # A resumed run is still past its first epoch.
    resumed = train(config, dataset, tmp_path / "run", resume=True)
    whole = train(config, dataset, tmp_path / "unbroken", resume=True)
    assert resumed.rows[-1]["test_loss"] == whole.rows[-1]["test_loss"]
    end = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(one[k], end[k]) for k in means)


def test_other_recipes_keep_train_mode():
    model = torch.nn.Sequential()
    model.attention = None
    steps = Steps.__new__(Steps)
    steps.model, steps.device = model, torch.device("cpu")
    steps.loss, steps.correct = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    steps.learn([])
    assert model.training
    steps.learn([], training=False)
    assert not model.training


# --- forms of attention ---------------------------------------------------------------------------


def test_they_are_reached_by_the_recipe_alone():
    assert not [name for name in attention_names() if "publish" in name.lower()]
    for name in attention_names():
        library, published = get_attention(name), get_attention(name, published=True)
        assert (library is not published) == (name in FORMS)
        for recipe in ("fair", "document", "quick"):
            if name == "multi_head":
                config = load_recipe(recipe, {"model.mlp.hidden": 16, "model.mlp.match": ""})
                net = build_model(config.run_config("mlp", name, 0), 10)
                assert type(net.attention) is library


def test_an_option_that_the_published_form_lacks_is_an_error():
    recipe = load_recipe("published", {"attention.local.two_dimensional": True})
    with pytest.raises(ValueError, match=r"local as published: unknown 'two_dimensional'"):
        recipe.run_config("cnn", "local", 0)
    assert "two_dimensional" not in attention_options("local", published=True)


def test_padding_is_refused(generator):
    with pytest.raises(ValueError, match="key_mask"):
        layer_of("local")(tokens(generator), torch.ones(2, N, dtype=torch.bool))


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_differentiable_and_their_rows_sum_to_one(name, generator):
    layer, x = layer_of(name), tokens(generator)
    layer(x.requires_grad_()).square().sum().backward()
    assert x.grad.abs().sum() > 0
    if name != "linformer":  # its weights have signs where it projects
        rows = layer.float().attention_matrix(x.float())
        assert rows.shape == (2, H, N, N)
        assert (rows.sum(-1) - 1).abs().max() < 1e-5


def heads_of(layer, x):
    """q, k, v (B, H, N, D) by the weights, in the simplest way."""
    wq, wk, wv = layer.qkv.weight.chunk(3)
    return [(x @ w.T).unflatten(-1, (H, D)).transpose(1, 2) for w in (wq, wk, wv)]


def out(layer, y):
    return y.transpose(1, 2).flatten(2) @ layer.out.weight.T


@torch.no_grad()
def test_masks_of_sparse_and_local(generator):
    x = tokens(generator)
    for name, sees in (
        ("sparse", lambda i, j: j <= i and (i // 4 == j // 4 or j % 4 == 0)),
        ("local", lambda i, j: abs(i - j) <= 2),
    ):
        layer = layer_of(name)
        q, k, v = heads_of(layer, x)
        mask = torch.tensor([[sees(i, j) for j in range(N)] for i in range(N)])
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~mask, -math.inf)
        assert torch.allclose(layer(x), out(layer, scores.softmax(-1) @ v))
        assert torch.equal(layer.attention_matrix(x)[0, 0] > 0, mask)


@torch.no_grad()
def test_noise_of_deepseek_is_of_training_alone(generator):
    layer, plain, x = layer_of("deepseek_mla"), layer_of("multi_head"), tokens(generator)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    layer.train()
    noisy = torch.stack([layer(x) for _ in range(2)])
    assert not torch.equal(*noisy)
    # d softmax ≤ |ε|/2 a weight, ε ~ 0.01: small, but there
    assert 1e-5 < (noisy[0] - plain(x)).abs().max() < 0.05


@torch.no_grad()
def test_kimi_adds_a_tenth_of_its_context(generator):
    layer, x = layer_of("kimi_k2"), tokens(generator)
    q, k, v = heads_of(layer, x)
    context = x @ layer.context.weight.T
    scores = q @ k.mT / math.sqrt(D) + 0.1 * (context @ context.mT)[:, None]
    assert torch.allclose(layer(x), out(layer, scores.softmax(-1) @ v))


@torch.no_grad()
def test_kv_compression_keeps_each_heads_heaviest_keys(generator):
    layer, x = layer_of("kv_compression"), tokens(generator)
    q, k, v = heads_of(layer, x)
    scores = q @ k.mT / math.sqrt(D)
    for b in range(2):
        for h in range(H):
            kept = scores[b, h].softmax(-1).sum(0).argsort(descending=True)[: N // 2]
            expected = scores[b, h][:, kept].softmax(-1) @ v[b, h][kept]
            assert torch.allclose(layer.mix(q, k, v)[b, h], expected)


@torch.no_grad()
def test_linformer_projects_only_more_than_k_tokens(generator):
    layer, plain = layer_of("linformer"), layer_of("multi_head")
    plain.load_state_dict(layer.state_dict(), strict=False)
    few, many = tokens(generator, 5), tokens(generator)
    assert torch.equal(layer(few), plain(few))
    q, k, v = heads_of(layer, many)
    k, v = layer.E.weight[:, :N] @ k, layer.F.weight[:, :N] @ v
    assert torch.allclose(layer(many), out(layer, F.scaled_dot_product_attention(q, k, v)))


@torch.no_grad()
def test_linear_has_a_map_for_q_and_one_for_k(generator):
    layer, x = layer_of("linear"), tokens(generator)
    q, k, v = heads_of(layer, x)
    fq, fk = (F.elu(t @ w.weight.T) + 1 for t, w in zip((q, k), layer.features, strict=True))
    weights = fq @ fk.mT
    assert torch.allclose(layer(x), out(layer, weights / weights.sum(-1, keepdim=True) @ v))


@torch.no_grad()
@pytest.mark.parametrize("features", [8, 5, 20])
def test_performer_has_at_most_d_orthonormal_rows(features, generator):
    layer, x = layer_of("performer", num_features=features), tokens(generator)
    w = layer.projection
    assert w.shape == (min(features, D), D)
    assert torch.allclose(w @ w.T, D * torch.eye(len(w), dtype=w.dtype), atol=1e-5)
    q, k, v = heads_of(layer, x)
    fq, fk = ((t / D**0.25 @ w.T - (t / D**0.25).square().sum(-1, True) / 2).exp() for t in (q, k))
    weights = fq @ fk.mT
    assert torch.allclose(layer(x), out(layer, weights / weights.sum(-1, keepdim=True) @ v))
    again = layer_of("performer", num_features=features, seed=1)
    assert not torch.equal(w, again.projection)


# --- figures --------------------------------------------------------------------------------------


def test_the_published_table_is_whole():
    assert len(curves()) == 22 and len(published_attentions()) == 11
    assert "flex" not in published_attentions()
    assert set(published_attentions()) <= set(attention_names())
    assert {len(part) for run in curves().values() for part in run} == {EPOCHS}
    control, kimi = curves()["cnn", "none"], curves()["mlp", "kimi_k2"]
    assert (control.test[-1], control.train[-1], control.test[0]) == (0.7044, 0.8926, 0.4310)
    assert (kimi.test[-1], kimi.train[-1]) == (0.5103, 0.9545)


def run_of(model, attention, seed, test, epochs=100, tmp="x"):
    summary = {"final_test_accuracy": test, "final_train_accuracy": 0.9}
    rows = [{}] * epochs
    return Run(model, attention, seed, tmp, "done", rows=rows, summary=summary)


def test_the_section_counts_what_lies_near():
    runs = [run_of("cnn", "none", s, 0.7044 + 0.01 * s) for s in range(2)]  # mean 0.5 points off
    runs += [run_of("mlp", "self", 0, 0.5236 + 0.0149), run_of("mlp", "linear", 0, 0.5110 - 0.0151)]
    text = published_section(runs, "a note")
    assert "2 of 3 test accuracies lie within 1.5 points" in text and "19 of 22" in text
    assert "a note" in text and "These runs had" not in text
    lines = {tuple(c.strip() for c in line.split("|")[1:3]): line for line in text.splitlines()
             if line.startswith("| ")}  # fmt: skip
    assert "| 70.9 ± 6.4 | +0.5 | yes |" in lines["CNN", "Control"]
    assert "| -1.5 | no |" in lines["MLP", "Linear"]
    assert "| – | – | – |" in lines["MLP", "Local"]
    short = published_section([run_of("mlp", "none", 0, 0.5, epochs=5)], "n")
    assert "These runs had 5 epochs, the published ones 100" in short
    assert published_section([], "n") == ""


def curve_of(model, attention, shift, epochs, status="done", seed=0) -> Run:
    """The published run, `shift` above it, as far as `epochs`."""
    theirs = curves()[model, attention]
    rows = [
        {"epoch": e + 1, "test_accuracy": theirs.test[e] + shift, "train_accuracy": theirs.train[e]}
        for e in range(epochs)
    ]
    summary = {"final_test_accuracy": rows[-1]["test_accuracy"], "final_train_accuracy": 0.9}
    return Run(model, attention, seed, Path("x"), status, rows, summary, epochs=100)


def test_epochs_stand_beside_the_published_ones_also_of_a_run_that_was_stopped(tmp_path):
    runs = [curve_of("cnn", "none", 0.01, 12, "running"), curve_of("mlp", "self", -0.02, 100)]
    runs += [curve_of("mlp", "self", 0.04, 50, "running", seed=1)]  # not in the means
    runs[0].rows[2]["test_accuracy"] -= 0.05
    pairs = beside(runs)
    assert {pair: len(ours["test"]) for pair, (ours, _) in pairs.items()} == {
        ("mlp", "self"): 100, ("cnn", "none"): 12,
    }  # fmt: skip
    lines = [[c.strip() for c in line.split("|")[1:-1]]
             for line in published_section(runs, "n").splitlines()]  # fmt: skip
    marks = next(line for line in lines if "Epoch 1" in line)
    assert marks[3:-1] == [f"Epoch {m}" for m in (1, 2, 5, 10, 20, 50, 100)]
    control = [line for line in lines if line[:2] == ["CNN", "Control"]]
    assert control[0][3] == "stopped after epoch 12 of 100"
    assert control[1][2:4] == ["here, 12 epochs", "44.1"] and control[1][7:] == ["–"] * 4
    assert control[2][2:4] == ["published", "43.1"]
    assert control[3][2:4] == ["difference", "+1.0"] and control[3][-1] == "-4.0 (epoch 3)"
    assert ["difference", *["-2.0"] * 7] in [line[2:10] for line in lines]
    charts = published_charts(pairs).charts
    assert [len(s["x"]) for s in charts[1]["series"]] == [12] * 4
    published_picture(tmp_path / "p.png", pairs)
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_runs_scored_but_once_have_no_curve():
    run = curve_of("mlp", "self", 0, 100)
    for row in run.rows[:-1]:
        row["test_accuracy"] = None
    assert beside([run]) == {} and "Epoch 1" not in published_section([run], "n")


def test_an_unfinished_comparison_is_reported_as_far_as_it_came(tmp_path):
    from tab.report import write_report

    dataset, out = load_dataset("shapes:40/20"), tmp_path / "out"
    small = {"train.epochs": 3, "train.batch_size": 20, "model.mlp.hidden": 16}
    plan = Plan(load_recipe("published", small), Grid("published", ["mlp"], ["none", "self"], 1,
                                                      "shapes:40/20", "cpu"))  # fmt: skip
    plan.save(out, dataset)
    train(plan.configs()[0], dataset, out / "runs" / "mlp-none-s0", stop_after=2)
    sweep = ROOT / "results" / "examples" / "sweep"
    text = write_report(out, dataset, sweep=sweep).read_text()
    assert "Recipe `published`, 3 epochs" in text and "## Hyperparameters" in text
    assert "`mlp-none-s0`: stopped after epoch 2 of 3" in text
    assert "not begun: `mlp-self-s0`" in text
    assert "| here, 2 epochs |" in text and "pictures/published.png" in text
    page = (out / "report.html").read_text()
    assert "stopped after epoch 2 of 3" in page and "MLP: Control</figcaption>" in page


def test_a_comparison_reports_beside_the_published_figures(tmp_path):
    from tab.report import write_report

    dataset = load_dataset("shapes:40/20")
    small = {"train.epochs": 1, "train.batch_size": 20, "model.mlp.hidden": 16}
    recipe = load_recipe("published", small)
    assert recipe.attentions() == published_attentions()
    assert load_recipe("fair").attentions() == attention_names()
    grid = Grid("published", ["mlp"], ["none", "multi_head"], 1, "shapes:40/20", "cpu")
    Plan(recipe, grid).save(tmp_path / "out", dataset)
    compare(Plan.load(tmp_path / "out"), dataset, tmp_path / "out")
    text = write_report(tmp_path / "out", dataset).read_text()
    assert "Beside the published figures" in text and dataset.note in text
    with (tmp_path / "out" / "experiment_summary.csv").open(newline="") as file:
        found = {r["attention_type"]: float(r["final_test_accuracy"]) for r in csv.DictReader(file)}
    assert f"| 53.2 | {100 * found['Control']:.1f} |" in text
