"""tools.trials: the networks and configurations of the rows, which rows are one run, and names of budgets."""

import dataclasses
import re

import pytest
import torch

from config import ConfigError
from sasa.analysis.flops import count_parameters
from sasa.training.network import build_network
from tools import audit, paper
from tools.paper import DEPTHS, Row, rows_for
from tools.trials import TABLES, Budget, Trial, run_name, unique, varied

TABLE_5 = rows_for(TABLES["5"], "ResNet26")


def parameters_of(row, form: str, classes: int) -> int:
    """Of the network that the row's train.py line builds."""
    config = dataclasses.replace(Trial(row, 0).config(Budget("CIFAR10")), form=form)
    with torch.device("meta"), audit.NoInitialisation():
        return count_parameters(build_network(config, classes))


@pytest.mark.parametrize("table", paper.TABLES)
def test_what_is_trained_is_what_is_audited(table):
    """By their networks; m = 4, the default, of the two that the audit counts."""
    model = None if table == "1" else "ResNet50"
    audited = {(row.model, row.label.removesuffix(", m = 4")): row for row in audit.audited(TABLES[table])}
    for row in rows_for(TABLES[table], model):
        counted = audit.audit_row(audited[row.model, row.label])
        assert parameters_of(row, "imagenet", 1000) == counted["parameters"]


def test_the_ports_rows_build_its_networks():
    for row in TABLES["port"].rows:
        millions = parameters_of(row, "small", 10) / 1e6
        assert abs(millions - row.printed.mparams) < 0.06, row  # printed cut or rounded, with 1 or 2 decimals


def test_each_row_of_the_recipe_changes_one_thing():
    base, *others = rows_for(TABLES["recipe"], "ResNet26")
    changes = []
    for row in others:
        ours, default = (Trial(r, 0).config(Budget("DIGITS")).to_dict() for r in (row, base))
        changes.append({key for key in ours if ours[key] != default[key]})
    sgd, stem = {"optimizer", "lr", "weight_decay"}, {"stem"}
    assert [c for c in changes if len(c) > 1] == [sgd, sgd, stem | {"stem_window"}]
    assert {key for c in changes if len(c) == 1 for key in c} == {
        "lr", "embedding_std", "scale", "embedding_weight_decay", "zero_init_residual", "stem",
    }  # fmt: skip
    assert others[-1].base == "--stem"  # so this one changes one thing, too


def test_rows_that_tables_share_are_one_run_and_others_have_names_of_their_own():
    chosen = [row for table in TABLES.values() for row in rows_for(table, "ResNet26")]
    different = unique(chosen)
    # 3 + 8 + 5 + 3 + 2 + 3 + 3 + 12 + 2 rows; the default is in all of 1, 3, 4, 5, 6, port, recipe, strong
    assert len(chosen) == 41 and len(different) == 41 - 7 - 1 - 3
    configs = {str(Trial(row, 0).config(Budget("DIGITS"))) for row in different}
    assert len(configs) == len({run_name(row, 0) for row in different}) == len(different)


def test_what_rows_vary_is_what_they_or_their_bases_set():
    assert varied(rows_for(TABLES["6"], "ResNet26")) == {"content"}
    assert varied([Row("conv stem", "--kernel-size 5", base="--stem")]) == {"kernel_size", "stem"}


def test_a_depth_cuts_the_tables_whose_rows_name_their_networks():
    assert [len(rows_for(TABLES["1"], depth)) for depth in (None, *DEPTHS)] == [9, 3, 3, 3]
    assert [len(rows_for(TABLES["port"], depth)) for depth in (None, *DEPTHS)] == [6, 3, 2, 1]


def test_a_budgets_folder_does_not_depend_on_how_its_flags_are_written():
    assert Budget("DIGITS").name() == "digits"
    recipes = Budget("DIGITS", ("--epochs", "12", "--save-minutes", "2")).for_rows(TABLE_5)
    assert recipes.name() == "digits" and recipes.flags == ("--save-minutes", "2")  # which changes no result
    one = Budget("FashionMNIST", ("--epochs", "3", "--train-images", "10000"))
    other = Budget("FashionMNIST", ("--train-images", "10000", "--num-workers", "1", "--epochs", "03"))
    assert one.name() == other.name() == "fashionmnist-train-images-10000-epochs-3"
    assert Budget("DIGITS", ("--holdout", "100", "--lr", "2e-3")).name() == "digits-holdout-100-lr-0.002"
    assert Budget("DIGITS", ("--holdout", "0.5")).name() == "digits-holdout-0.5"
    assert Budget("DIGITS", ("--max-steps", "2")).name() == "digits-max-steps-2"  # cut runs are no whole ones
    switches = Budget("DIGITS", ("--randaugment", "--no-progress", "--border", "ZERO")).words()
    assert switches == ["--border", "zero", "--auto-augment", "rand"]


@pytest.mark.parametrize(
    "flags",
    ["--no-zero-init-residual", "--zero-init-residual", "--attention-stages", "--attention-stages 2 3", "--no-content",
     "--grouped", "--lr 1e-5 --ema 0", "--holdout 0.25 --img-size 16", "--recipe paper --optimizer adamw"],
)  # fmt: skip
def test_a_budgets_words_are_flags_that_say_the_same(flags):
    dataset = "CIFAR10" if "--no-" in flags else "IMAGENET"  # where it is not the recipe's
    budget = Budget(dataset, tuple(flags.split()))
    again = Budget(dataset, tuple(budget.words()))
    assert budget.given() and again.given() == budget.given() and again.words() == budget.words()


def test_a_flag_is_left_out_only_where_it_changes_no_row():
    """12 epochs are what the recipe of DIGITS says, and not what `strong` says."""
    budget = Budget("DIGITS", ("--epochs", "12", "--batch-size", "32"))
    assert budget.for_rows(TABLE_5).words() == []
    strong = rows_for(TABLES["strong"], "ResNet26")
    for chosen in (strong, strong[1:]):
        kept = budget.for_rows(chosen)
        assert (
            kept.words() == ["--epochs", "12", "--batch-size", "32"] and kept.name() == "digits-epochs-12-batch-size-32"
        )
        assert [Trial(row, 0).config(kept) for row in chosen] == [Trial(row, 0).config(budget) for row in chosen]


def test_a_rate_counts_also_where_it_is_the_recipes_as_that_one_is_lowered_for_few_images():
    assert Budget("DIGITS", ("--lr", "1e-3")).for_rows(TABLE_5).name() == "digits-lr-0.001"


@pytest.mark.parametrize(
    "flags",
    ["--early-stop 2 --holdout 0.2", "--loss bce --bce-threshold 0.3", "--lr 0.01 --min-lr 0.005",
     "--epochs 40 --warmup-epochs 15"],
)  # fmt: skip
def test_flags_that_need_each_other_are_a_budget(flags):
    budget = Budget("DIGITS", tuple(flags.split())).for_rows(TABLE_5)
    assert sorted(budget.words()) == sorted(flags.split())


@pytest.mark.parametrize("flags", ["--early-stop 2", "--min-lr 0.5", "--warmup-epochs 15"])
def test_flags_that_lack_another_one_are_refused(flags):
    with pytest.raises(ConfigError, match=flags):
        Budget("DIGITS", tuple(flags.split())).for_rows(TABLE_5)


def test_class_weights_are_what_the_run_holds_and_a_digest_in_names(tmp_path):
    assert Budget("DIGITS", ("--class-weights", "Balanced")).for_rows(TABLE_5).name() == "digits-class-weights-balanced"
    file = tmp_path / "weights.json"
    file.write_text('{"b": 2, "a": 1}')
    budget = Budget("DIGITS", ("--class-weights", str(file))).for_rows(TABLE_5)
    file.write_text('{"b": 3, "a": 1}')  # too late
    assert budget.words() == ["--class-weights", '{"a": 1.0, "b": 2.0}']
    assert Trial(TABLE_5[0], 0).config(budget).class_weights == '{"a": 1.0, "b": 2.0}'
    other = Budget("DIGITS", ("--class-weights", str(file))).for_rows(TABLE_5)
    for name in (budget.name(), other.name()):
        assert re.fullmatch("digits-class-weights-[0-9a-f]{8}", name)
    assert budget.name() != other.name()
    assert " ".join(budget.label()) == budget.name().replace("digits-", "--").replace("weights-", "weights ")
    with pytest.raises(ConfigError, match="cannot be read"):
        Budget("DIGITS", ("--class-weights", "nowhere.json")).for_rows(TABLE_5)
