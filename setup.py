"""Packaging of rlhf-engine.

A range is what the tests are run on: its lower bound is the oldest version tried, its upper bound the next release that
may break us. constraints.txt has the exact tested set. The files in ds_configs/ are read from the checkout, so install
with `pip install -e .`.
"""

from pathlib import Path

from setuptools import find_packages, setup

QUANTIZATION = ["bitsandbytes>=0.50,<0.51"]  # engine/models/quantization.py switches one of its paths off

readme = Path(__file__).parent / "README.md"

setup(
    name="rlhf-engine",
    version="0.1.0",
    description="SFT, reward models, DPO and PPO for language models on DeepSpeed, from one CPU to many GPUs",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The rlhf-engine authors",
    python_requires=">=3.11",
    packages=[*find_packages(include=["engine", "engine.*"]), "launch"],
    package_data={
        "engine": ["memory_plan/shapes/*.json", "report/assets/*"],
        "launch": ["recipes/*.yaml", "*.sh"],
    },
    install_requires=[
        "torch>=2.11,<3",
        "deepspeed>=0.19.8,<0.20",  # engine/distributed uses private API
        "transformers>=5.17,<6",
        "peft>=0.21,<1",
        "datasets>=5.2,<6",
        "jinja2>=3.1,<4",
        "httpx>=0.28,<1",
        "safetensors>=0.8,<1",
        "numpy>=2.4,<3",
        "pyyaml>=6.0,<7",
        "jsonargparse>=4.53,<5",
        "docstring-parser>=0.18,<1",  # with it jsonargparse shows what docstrings say in --help
        "wandb>=0.31,<1",
        "tqdm>=4.70,<5",
        "psutil>=7.2,<8",
        "packaging>=26,<27",
        "ninja>=1.13,<2",  # DeepSpeed compiles its operators when they are first used
    ],
    extras_require={
        "quantization": QUANTIZATION,
        "test": [
            "pytest>=9.0,<10",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.170,<7",
            "ruff>=0.17,<0.18",
            "playwright>=1.65,<2",
            *QUANTIZATION,
        ],
        "bench": ["trl==1.11.0", "accelerate>=1.15,<2", "matplotlib>=3.11,<4"],
    },
)
