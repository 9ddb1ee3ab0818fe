"""The README's five examples, run one after the other as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_examples_run_and_write_what_they_say(tmp_path):
    assert len(EXAMPLES) == 5
    code = "\n".join([*EXAMPLES, "for each in (picture, without_the_last_block, filled): print(each.size)"])
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "torch.Size([1, 4, 96, 96])" in ran.stdout
    assert "torch.Size([1, 1024, 64])" in ran.stdout
    assert re.search(r"modulation +3,247,448,064 +27.29%", ran.stdout)
    assert ran.stdout.endswith("(128, 128)\n" * 3)
    assert (tmp_path / "flux-dev.onnx").stat().st_size < 200_000
    assert (tmp_path / "decoder.onnx").stat().st_size > 1_000_000


def test_the_prose_is_short():
    prose = "\n".join(line for line in re.sub(r"```.*?```", "", README, flags=re.S).splitlines() if line[:1] != "|")
    assert len(prose.split()) <= 900


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
