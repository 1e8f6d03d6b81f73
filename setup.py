"""Package layout: two import packages from one distribution.

`kernels/` itself is not a package: PyPI has a package `kernels` that transformers imports, and an
`__init__.py` here would shadow it for anyone running from the repository root.
"""

from setuptools import find_packages, setup

setup(
    packages=["cdfast_kernels", *find_packages(include=["cdfast", "cdfast.*"])],
    package_dir={"cdfast_kernels": "kernels/cdfast_kernels"},
    package_data={"cdfast": ["recipes/*.yaml", "assets/**/*"], "cdfast_kernels": ["py.typed"]},
)
