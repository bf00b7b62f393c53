"""The examples of docs/python.md run as they are printed."""

import doctest
import re

from configs.load import CHECKOUT


def test_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = CHECKOUT / "docs" / "python.md"
    text = re.sub("^```.*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)  # which would be output
    examples = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    said: list[str] = []
    result = doctest.DocTestRunner().run(examples, out=said.append)
    assert result.attempted > 20 and not result.failed, "".join(said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle.mp4", "my_model"]
