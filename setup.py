"""Package metadata: the one place for dependencies and entry points. Versions tested together: constraints.txt."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

LINUX = sys.platform.startswith("linux")

setup(
    name="fairseq-hyperrouter",
    version="0.1.0",
    description="Sparse Mixture-of-Experts models for fairseq: HyperRouter and its peers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["fairseq_hyperrouter", "fairseq_hyperrouter.*"]),
    ext_modules=[
        Extension(
            f"fairseq_hyperrouter.native._{name}",
            [f"fairseq_hyperrouter/native/{name}.c"],
            depends=[f"fairseq_hyperrouter/native/{header}.h" for header in ("common", "tiles")],
            extra_compile_args=["-O3", *["-fopenmp"] * LINUX],
            # Not linked with an OpenMP: they find that of torch, so that there is one pool of threads; or say at once
            # that there is none.
            extra_link_args=["-Wl,-z,now"] * LINUX,
            optional=True,  # without a compiler other backends do the work
        )
        for name in ("few_rows", "run_products", "causal_attention")
    ],
    python_requires=">=3.10",
    install_requires=[
        "fairseq-fixed==0.12.3.1; python_version >= '3.11'",
        "fairseq==0.12.2; python_version < '3.11'",  # as fairseq-fixed, but not importable from 3.11 on
        "torch",
        "fairscale>=0.4.13",
        "sacrebleu",
        "numpy",
        "matplotlib>=3.7",
        "pyyaml",
        "tqdm",
    ],
    extras_require={
        "test": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "scipy", "tensorboardX"),
            "triton; sys_platform == 'linux' and python_version >= '3.11'",  # its interpreter needs no GPU
        ]
    },
    entry_points={"console_scripts": ["fairseq-hyperrouter = fairseq_hyperrouter.commands:main"]},
)
