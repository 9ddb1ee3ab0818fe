"""Edges and depth made of a picture."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    pipeline,
)

from fluxlab.pipeline.control import depth, edges


def square():
    image = Image.new("RGB", (64, 48), "white")
    ImageDraw.Draw(image).rectangle((16, 12, 47, 35), fill="blue")
    return image


def test_edges_are_opencvs_at_the_published_thresholds():
    image = square()
    found = edges(image)
    assert found.mode == "RGB"
    assert found.size == image.size
    line = np.asarray(found)[..., 0]
    assert set(np.unique(line)) == {0, 255}
    assert np.array_equal(line, cv2.Canny(np.asarray(image), 50, 200))
    rows, columns = np.nonzero(line)  # around the square, within a pixel
    assert abs(rows.min() - 12) <= 1
    assert abs(columns.max() - 47) <= 1
    assert (line > 0).sum() < 2.5 * (32 + 24)


def test_a_faint_step_is_no_edge():
    image = Image.new("L", (32, 32), 100)
    image.paste(104, (16, 0, 32, 32))
    assert not np.asarray(edges(image)).any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=56,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    sizes = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
    config = DepthAnythingConfig(backbone_config=backbone, head_hidden_size=8, **sizes)
    root = tmp_path_factory.mktemp("depth")
    DepthAnythingForDepthEstimation(config).save_pretrained(root)
    DPTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(root)
    return root


def test_depth_is_transformers(folder):
    found = depth(square(), folder)
    theirs = pipeline("depth-estimation", model=str(folder), image_processor=str(folder))(square())["depth"]
    assert found.size == (64, 48)
    assert np.array_equal(np.asarray(found)[..., 0], np.asarray(theirs))
    assert np.asarray(found).min() == 0
    assert np.asarray(found).max() == 255


def test_a_depth_model_that_is_not_here_is_said():
    with pytest.raises(ValueError, match=r"is not on this disk .*or give control="):
        depth(square())


@pytest.mark.usefixtures("as_users_run_it")
def test_no_picture_is_said():
    for make in (edges, depth):
        with pytest.raises(ValueError, match="give a PIL image"):
            make("x.png")
