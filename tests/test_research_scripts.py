"""Every script of research/ runs in its smallest setting.

A file of its own, because the tests of one file run one after the other in one process.
"""

import pytest
from test_scripts import check_smallest, folder, scripts_of  # noqa: F401  (folder is a fixture)


@pytest.mark.parametrize("script", scripts_of("research/"))
def test_a_script_runs_in_its_smallest_setting(script, folder, tmp_path):  # noqa: F811
    check_smallest(script, folder, tmp_path)
