"""The picture of the views can be drawn of every data set."""

from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from pipeline.write import write_shards
from tests.test_shards import names, pictures
from tools.show_views import app


def test_a_set_of_few_images_gives_as_many_rows(tmp_path: Path) -> None:
    """Each row is 2 pixels of frame and the views beside each other: an image and a pair."""
    data = write_shards(pictures(3), tmp_path / "set", classes=names(3))
    arguments = [str(data.root), str(tmp_path / "views.png"), "--views", "cifar", "--pairs", "1"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "3 images, each with 1 pairs of views at 32 px" in result.stdout
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size == (3 * 34 + 2, 3 * 34 + 2)
