"""Where compiled programs are kept."""

import os
import stat

import jax
import pytest

from jasr import compilation_cache


@pytest.fixture
def unset(monkeypatch):
    """No directory given to JAX yet; what it had comes back afterwards."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("JASR_CACHE", raising=False)
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


def test_cache_is_on_by_default_below_the_home(unset, tmp_path):
    unset.setenv("HOME", str(tmp_path))
    directory = compilation_cache.enable()
    assert directory == tmp_path / ".cache" / "jasr" / "xla" / compilation_cache.machine()
    assert directory.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(directory)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_jasr_cache_moves_it(unset, tmp_path):
    unset.setenv("JASR_CACHE", str(tmp_path / "elsewhere"))
    assert compilation_cache.enable().parent == tmp_path / "elsewhere"


@pytest.mark.parametrize("value", ["", "off", "0"])
def test_jasr_cache_off_turns_it_off(unset, value):
    unset.setenv("JASR_CACHE", value)
    assert compilation_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_directory_that_jax_was_given_stays(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compilation_cache.enable() == tmp_path


def test_a_home_that_cannot_be_written_to_turns_it_off(unset, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    unset.setenv("JASR_CACHE", str(blocked))
    assert compilation_cache.enable() is None
    if os.getuid() != 0:  # root writes anywhere
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        unset.setenv("JASR_CACHE", str(tmp_path / "new"))
        assert compilation_cache.enable() is None
        tmp_path.chmod(stat.S_IRWXU)
