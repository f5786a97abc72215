"""Forked programs end, speak and find their modules as those of `python` do."""

import os
import signal
import time

import pytest

from bitkernels_tests import forked


def test_status_output_and_surroundings(tmp_path):
    (tmp_path / "beside.py").write_text("import os, sys; print(os.getcwd(), sys.argv[1:])")
    (tmp_path / "script.py").write_text("import beside, sys; sys.exit('no')")
    for how in (("-m", "beside"), (str(tmp_path / "script.py"),), ("-c", "import beside")):
        done = forked.run(*how, "--much", cwd=tmp_path)
        assert done.stdout == f"{tmp_path} ['--much']\n"
        assert (done.returncode, done.stderr) == ((1, "no\n") if how[0] not in ("-m", "-c")
                                                  else (0, ""))
    code = "import os; print(os.environ['A'], 'PATH' in os.environ); raise SystemExit(3)"
    done = forked.run("-c", code, env={"A": "1"})
    assert (done.returncode, done.stdout) == (3, "1 False\n")
    done = forked.run("-c", "os.fork()")
    assert done.returncode == 1 and "NameError" in done.stderr and not done.stdout


def test_ends_by_signals_and_by_deadlines():
    program = forked.Program("-c", "import time; print('up', flush=True); time.sleep(60)")
    time.sleep(0.1)
    assert program.poll() is None
    program.kill()
    program.communicate()
    assert program.returncode == -signal.SIGKILL
    with pytest.raises(TimeoutError, match="0.2 s"):
        forked.run("-c", "import time; time.sleep(60)", timeout=0.2)


def test_of_the_package_nothing_is_imported():
    code = ("import sys; assert 'torch' in sys.modules; "
            "assert not [m for m in sys.modules if m.split('.')[0] in ('bitkernels', 'triton')]")
    assert forked.run("-c", code, env=os.environ).returncode == 0
