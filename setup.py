"""Package metadata. Exact versions that CI tests are in `constraints.txt`."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "numpy>=1.26",
    "absl-py>=2.1",
    "etils[epath]>=1.9",
    "tokenizers>=0.21",
    "jinja2>=3.1.6",
    "ml_dtypes>=0.5",
    "pyarrow>=17",
    "zstandard>=0.22",
    "tensorboardX>=2.6",
    "rich>=13.7",
    "matplotlib>=3.8",
]

TOOLS = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.13"]

setup(
    name="deepseek_jax",
    version="0.1.0",
    description="The DeepSeek-V3 training system in JAX: model, parallelism, precision, kernels and recipes.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["deepseek_jax*", "pallas_kernels*", "experiments*", "tools*"]),
    package_data={"pallas_kernels": ["measured/*.json"]},
    install_requires=CORE,
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2"],
        "parity": ["torch>=2.9", "transformers>=5.0", "safetensors>=0.5"],
        "wandb": ["wandb>=0.17"],
        "gcs": ["etils[epath-gcs]>=1.9"],
        "s3": ["etils[epath-s3]>=1.9"],
        "tools": TOOLS,
        "dev": TOOLS,  # the same under another name
    },
)
