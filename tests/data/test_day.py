from __future__ import annotations

import threading
from datetime import date

from llamafactory.data.day import fixed_day, now, today
from llamafactory.data.jinja_environment import compile_jinja, run_jinja
from llamafactory.data.tool_formats.llama3 import describe_tools


def test_a_fixed_day_counts_in_every_thread_and_ends_with_its_block() -> None:
    written: list[str] = []

    def render() -> None:
        written.append(run_jinja(compile_jinja("{{ strftime_now('%d %b %Y') }}"), {}))

    with fixed_day(date(2024, 2, 29)):
        thread = threading.Thread(target=render)
        thread.start()
        thread.join()
        assert (today(), now().date()) == (date(2024, 2, 29), date(2024, 2, 29))
        assert "Today Date: 29 Feb 2024" in describe_tools([])[0].text
        with fixed_day(date(2025, 1, 1)):
            assert today() == date(2025, 1, 1)
        assert today() == date(2024, 2, 29)
    assert written == ["29 Feb 2024"]
    assert date.today() >= today() > date(2025, 1, 1)
