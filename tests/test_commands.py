"""The command line as a user meets it: real processes, their output and exit statuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastcifar.commands import main
from tests.cifar_files import tiny_cifar10

ROOT = Path(__file__).parent.parent


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTCIFAR_HOME", str(tmp_path / "home"))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    return dict(os.environ, COLUMNS="100")


def fastcifar(
    *arguments: str, environment: dict[str, str], module: str = "fastcifar"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "perhaps you meant --epochs"),
        (["--epochs", "three"], "--epochs takes a whole number, got 'three'"),
        (["--epochs", "0"], "epochs must be a whole number at least 1, got 0"),
        (["--seed", "1.5"], "--seed cannot be '1.5'"),
        (["--lr", "fast"], "--lr takes a number, got 'fast'"),
        (
            ["--compile", "maybe"],
            "--compile must be one of auto, off, on, got 'maybe'",
        ),
        (["--split", "all"], "--split must be one of full, holdout, report, got 'all'"),
        (["--split", "None"], "--split must be one of full, holdout, report, got 'None'"),
        (["--change"], "--change needs a value"),
        (["--change", "--epochs", "3"], "--change needs a value"),
        (
            ["--device", "mps"],
            "device 'mps' cannot be used here (Could not run 'aten::empty.memory_format' with arguments",
        ),
        (["--seed"], "missing value for argument '--seed'"),
        (["--amp-dtype", "bfloat16"], "needs amp (--amp)"),
        (["stray"], "unrecognized options: stray"),
        (["--arch", "huge"], "unknown arch 'huge': choose from big, fast, small"),
        (["--recipe", "slow"], "unknown recipe 'slow': choose from fast, long, report"),
        (["--dataset", "mnist"], "unknown dataset 'mnist': choose from cifar10, cifar100, digits"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--data", "nowhere.tar.gz"], "nowhere.tar.gz: does not exist"),
        (["--resume", "nowhere"], "nowhere is not a run"),
    ],
)
@pytest.mark.usefixtures("environment")
def test_a_wrong_option_is_one_line_and_status_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("fastcifar: ")
    assert message in err
    assert not any(path.name != "home" for path in tmp_path.iterdir())


@pytest.mark.usefixtures("environment")
def test_an_altered_or_cut_archive_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "copy.tar.gz"
    tiny_cifar10(data)
    assert main(["train", "--data", str(data)]) == 2
    assert "is not the published cifar-10-python.tar.gz" in capfd.readouterr().err
    data.write_bytes(data.read_bytes()[:-100])
    assert main(["train", "--data", str(data), "--allow-unverified"]) == 2
    error = capfd.readouterr().err
    assert str(data) in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.tar.gz", "home"]
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_no_network_and_no_data_is_one_message(environment: dict[str, str], tmp_path: Path) -> None:
    # a proxy that refuses at once stands for a closed network
    closed = dict(environment, https_proxy="http://127.0.0.1:9")
    done = fastcifar("train", "--arch", "small", environment=closed)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for part in ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "--data", "--dataset digits"):
        assert part in done.stderr
    assert str(tmp_path / "home" / "downloads" / "cifar-10-python.tar.gz") in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("environment")
def test_the_commands_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capfd.readouterr().out
    assert "train" in out
    assert "convert" in out
    assert "evaluate" in out
    assert main([]) == 2
    assert main(["fly"]) == 2
    assert "unknown command 'fly': choose from train, convert, evaluate, verify, ablate" in capfd.readouterr().err
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("fastcifar 0.")


@pytest.mark.parametrize("command", ["train", "evaluate", "ablate"])
def test_help_is_quick_and_shows_examples(command: str, environment: dict[str, str]) -> None:
    code = (
        "import sys\nfrom fastcifar.commands import main\n"
        f"try:\n main(['{command}', '--help'])\nexcept SystemExit as end:\n assert end.code in (0, None)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "Example" in done.stdout
    assert "--device" in done.stdout


def test_a_run_from_the_command_line_and_its_table_again(environment: dict[str, str], tmp_path: Path) -> None:
    data = tmp_path / "tiny cifar.tar.gz"
    tiny_cifar10(data)
    options = ["--arch", "small", "--recipe", "report", "--epochs", "1", "--data", str(data), "--out", "run"]
    done = fastcifar(*options, "--allow-unverified", "--amp", environment=environment, module="fastcifar.train")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    for part in ("small on cifar10", "precision", "unverified copy", "epoch 1/1", "airplane", "report.html"):
        assert part in done.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["allow_unverified"] is True
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["data"]["verified"] is False
    kinds = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    data.unlink()  # the store is enough
    again = fastcifar("evaluate", "run", environment=environment)
    assert again.returncode == 0, again.stderr
    assert f"{100 * kinds[-1]['accuracy']:.2f} %" in again.stdout
    for option in ("--seed=0", "--recipe=fast", "--arch=big"):  # at their defaults, but not all are the run's
        expected = 0 if option == "--seed=0" else 2
        resumed = fastcifar("train", "--resume", "run", option, environment=environment)
        assert resumed.returncode == expected, resumed.stderr
        assert expected == 0 or "a resumed run keeps its options" in resumed.stderr
    shared = [line for line in again.stdout.splitlines() if "airplane" in line or "truck" in line]
    assert len(shared) == 2
    assert all(line in done.stdout for line in shared)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    environment: dict[str, str], tmp_path: Path, number: signal.Signals, status: int
) -> None:
    command = [sys.executable, "-m", "fastcifar.train", "--dataset", "digits", "--arch", "small", "--out", "run"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:  # the panel ends with the plan: the handlers are in place
        if "plan" in line:
            break
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err.count("\n") == 1
    assert "saved; go on with: fastcifar train --resume run" in err
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_closed_pipe_is_no_traceback(environment: dict[str, str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fastcifar", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(("closed", "status"), [(">&-", 0), ("2>&-", 0)])
def test_closed_streams_are_no_traceback(environment: dict[str, str], closed: str, status: int) -> None:
    command = f"{sys.executable} -m fastcifar --version {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (status, "")
    command = f"{sys.executable} -m fastcifar nothing {closed}"
    assert subprocess.run(["bash", "-c", command], capture_output=True, env=environment, check=False).returncode == 2
    command = f"{sys.executable} -m fastcifar train --epochs three {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("columns", ["20", "80", "300"])
def test_option_errors_are_whole_on_any_terminal(environment: dict[str, str], encoding: str, columns: str) -> None:
    out = "/data/" + "a-very-long-name-without-any-space-" * 4
    for arguments, told in (
        (["--epochs", "three"], "--epochs takes a whole number, got 'three'"),
        (["--epoch", "3"], "unrecognized options: --epoch, 3: perhaps you meant --epochs"),
        (["--out", out, "--resume", "x"], f"out '{out}' cannot be given with resume"),
    ):
        done = fastcifar(
            "train", *arguments, environment=environment | {"PYTHONIOENCODING": encoding, "COLUMNS": columns}
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"fastcifar: {told}"), done.stderr
        assert len(done.stderr.splitlines()) == 1
