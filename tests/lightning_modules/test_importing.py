"""Authors' checkpoints from the command line: a record whose weights are theirs, on which `test` and `predict` work."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import torch

from lightning_modules import load_run
from lightning_modules.destseg import DeSTSeg
from lightning_modules.hvq_trans import HVQTrans
from lightning_modules.mkd import MKD
from lightning_modules.running.command_line import main
from lightning_modules.uniad import UniAD
from models.backbones import BackboneConfig

BACKBONE = {"name": "test_efficientnet.r160_in1k", "levels": [2, 3, 4], "weights": "random", "padding": "default"}
HVQ_TRANS = {"d_model": 16, "heads": 2, "feedforward": 24, "encoder_layers": 2, "decoder_layers": 2, "codes": 12}
DESTSEG = {"stem": 8, "segmentation_width": 8}
UNIAD = {"d_model": 16, "heads": 2, "feedforward": 24, "encoder_layers": 1, "decoder_layers": 1, "neighbor_size": 1}


def renamed(name: str, rules: list[tuple[str, str]]) -> str:
    """The authors' name of one of ours: the first rule that fits, as the inverse of the importer's."""
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    raise AssertionError(name)


LAYERS = [
    (r"position\.", "pos_embed."),
    (r"encoder\.(\d+)\.attention\.", r"encoder.layers.\1.self_attn."),
    (r"decoder\.(\d+)\.attention1\.", r"decoder.layers.\1.self_attn."),
    (r"decoder\.(\d+)\.attention2\.", r"decoder.layers.\1.multihead_attn."),
    (r"(encoder|decoder)\.(\d+)\.feedforward\.", r"\1.layers.\2."),
    (r"(encoder|decoder)\.(\d+)\.norm", r"\1.layers.\2.norm"),
    (r"norm\.", "decoder.norm."),
]


def hvq_trans_state() -> dict[str, torch.Tensor]:
    module = HVQTrans(BackboneConfig(**BACKBONE | {"seed": 5}), image_size=64, **HVQ_TRANS)
    module.build(["bolt", "disc"], seed=3)
    state = {}
    for name, value in module.network.state_dict().items():
        if found := re.fullmatch(r"codebooks\.(\d)\.books\.(\d)\.(\w+)", name):
            leaf = {"codes": "embed", "counts": "cluster_size", "sums": "embed_avg"}[found[3]]
            name = f"quantize_list_{int(found[1]) + 1}.{found[2]}.{leaf}"
        else:
            rules = [(r"heads\.", "output_proj_list."), (r"input_projection\.", "quantize_conv_t."), *LAYERS]
            name = renamed(name, rules)
        state["module." + name] = value
    backbone = module.extractor.net.state_dict()
    return state | {f"module.enc.{name}": value for name, value in backbone.items()}


def destseg_state() -> dict[str, torch.Tensor]:
    module = DeSTSeg(BackboneConfig(**BACKBONE | {"seed": 5}), image_size=64, **DESTSEG)
    pyramid = {"pooled": "0.1", "dilated.0": "1", "dilated.1": "2", "dilated.2": "3"}
    state = {}
    for name, value in module.network.state_dict().items():
        if found := re.match(r"segmentation\.head\.0\.(pooled|dilated\.\d)\.(.*)", name):
            name = f"segmentation_net.head.0.aspp_feature_extractors.{pyramid[found[1]]}.{found[2]}"
        elif name.startswith("student.decoder."):
            number, rest = name.removeprefix("student.decoder.").split(".", 1)
            name = f"student_net.decoder_layer{4 - int(number)}.{rest}"
        elif found := re.match(r"student\.encoder\.stages\.(\d)\.(.*)", name):
            name = f"student_net.encoder.layer{int(found[1]) + 1}.{found[2]}"
        else:
            rules = [
                (r"student\.", "student_net."),
                (r"segmentation\.blocks\.", "segmentation_net.res."),
                (r"segmentation\.head\.0\.fusion", "segmentation_net.head.0.aspp_fusion_layer"),
                (r"segmentation\.head\.", "segmentation_net.head."),
            ]
            name = renamed(name, rules)
        state[name] = value
    backbone = module.extractor.net.state_dict()
    return state | {f"teacher_net.encoder.{name}": value for name, value in backbone.items()}


def uniad_state() -> dict[str, torch.Tensor]:
    module = UniAD(BackboneConfig(**BACKBONE | {"seed": 5}), image_size=64, **UNIAD)
    rules = [
        (r"input_projection\.", "input_proj."),
        (r"output_projection\.", "output_proj."),
        (r"position\.", "pos_embed."),
        (r"encoder\.(\d+)\.attention\.", r"transformer.encoder.layers.\1.self_attn."),
        (r"decoder\.(\d+)\.attention1\.", r"transformer.decoder.layers.\1.self_attn."),
        (r"decoder\.(\d+)\.attention2\.", r"transformer.decoder.layers.\1.multihead_attn."),
        (r"decoder\.(\d+)\.query", r"transformer.decoder.layers.\1.learned_embed.weight"),
        (r"(encoder|decoder)\.(\d+)\.feedforward\.", r"transformer.\1.layers.\2."),
        (r"(encoder|decoder)\.(\d+)\.norm", r"transformer.\1.layers.\2.norm"),
        (r"norm\.", "transformer.decoder.norm."),
    ]
    state = {"module.reconstruction." + renamed(n, rules): v for n, v in module.network.state_dict().items()}
    return state | {f"module.backbone.{name}": value for name, value in module.extractor.net.state_dict().items()}


def mkd_state() -> dict[str, torch.Tensor]:
    """A plain state dict of the cloner; the source is not in the authors' file."""
    return MKD(BackboneConfig(**BACKBONE), image_size=64).network.state_dict()


METHODS = {
    "mkd": ("MKD", {}, mkd_state),
    "hvq_trans": ("HVQTrans", HVQ_TRANS, hvq_trans_state),
    "destseg": ("DeSTSeg", DESTSEG, destseg_state),
    "uniad": ("UniAD", UNIAD, uniad_state),
}


@pytest.fixture
def prepared(tmp_path, data_root, make_project):
    """A project with a method's configuration and an authors' checkpoint of it, "authors.pth"."""

    def made(method: str):
        project = make_project(tmp_path, data_root)
        name, options, state = METHODS[method]
        project.use(f"{method}.{name}", backbone=BACKBONE, image_size=64, **options)
        torch.save({"epoch": 3, "state_dict": state()}, tmp_path / "authors.pth")
        return project

    return made


def run_import(project, method: str, *more: str, file: str = "authors.pth") -> None:
    checkpoint = f"--checkpoint={project.folder / file}"
    main(["import", f"--method={method}", checkpoint, f"--config={project.config}", "--run.name=theirs",
          "--trainer.logger=false", *more])  # fmt: skip


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name == "uniad" else pytest.mark.program) for name in METHODS]
)
def test_a_record_of_the_authors_weights_can_be_tested_and_predicted_with(prepared, method, data_root):
    project = prepared(method)
    run_import(project, method)
    folder = project.results / "runs" / "imported" / "theirs"
    from results.aggregator.records import read_record

    record = read_record(folder)
    assert any("authors.pth" in note and "not trained here" in note for note in record.record.notes)
    assert record.record.provenance["epochs"] == 0
    assert record.record.backbone["weights"] == ("random" if method == "mkd" else "file")
    before = record.metrics.value.tolist()
    main(["test", f"--config={folder / 'config.yaml'}", "--trainer.logger=false", "--run.overwrite=true"])
    again = read_record(folder)
    assert again.metrics.value.fillna(-1).tolist() == [-1 if value != value else value for value in before]
    assert any("not trained here" in note for note in again.record.notes)
    more = ["--model.init_args.predicted_class=bolt"] if method == "hvq_trans" else []
    images = f"--data.init_args.predict_root={data_root / 'bolt' / 'test'}"
    main(["predict", f"--config={folder / 'config.yaml'}", "--trainer.logger=false", images, *more])
    table = pd.read_csv(project.results / "work" / "imported" / "theirs" / "predictions" / "scores.csv")
    model = load_run(folder, category="bolt" if method == "hvq_trans" else None)
    scored = model(table.image.tolist()).image_scores.tolist()
    assert scored == pytest.approx(table.image_score.tolist(), rel=1e-5)


def test_the_weights_and_the_backbone_are_those_of_the_file(prepared):
    project = prepared("hvq_trans")
    run_import(project, "hvq_trans")
    state = torch.load(project.folder / "authors.pth", weights_only=True)["state_dict"]
    work = project.results / "work" / "imported" / "theirs"
    saved = torch.load(work / "checkpoints" / "last.ckpt", weights_only=False)
    assert saved["class_names"] == ["bolt", "disc"]
    own = saved["state_dict"]["network.codebooks.2.books.1.codes"]
    assert torch.equal(own, state["module.quantize_list_3.1.embed"])
    backbone = torch.load(work / "backbone.pth", weights_only=True)
    assert torch.equal(backbone["conv_stem.weight"], state["module.enc.conv_stem.weight"])


def test_what_cannot_be_imported_is_refused_in_a_sentence(prepared, tmp_path):
    project = prepared("uniad")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    with pytest.raises(SystemExit, match="no parameter of UniAD"):
        run_import(project, "uniad", file="foreign.pth")
    with pytest.raises(SystemExit, match=r"nothing\.pth"):
        run_import(project, "uniad", file="nothing.pth")
    with pytest.raises(SystemExit, match="--method names a profile"):
        main(["import", "--method=uniat", f"--checkpoint={tmp_path / 'authors.pth'}"])
    assert not (project.results / "runs" / "imported" / "theirs").exists()


def test_a_checkpoint_of_another_number_of_classes_is_refused(prepared):
    project = prepared("hvq_trans")
    one = f"[{{'name': 'mvtec_ad', 'root': '{project.data}', 'categories': ['disc']}}]"
    with pytest.raises(SystemExit, match="The checkpoint has 2 classes, the data 1"):
        run_import(project, "hvq_trans", f"--data.init_args.datasets={one}")
