"""epmoe.migrate.json: what it says is done, all or nothing; what is wrong is named; a running process follows it."""

import json
import os
import tempfile
import time
import unittest
import warnings
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

from test_shim import Case, combine_call

from epmoe import shim
from epmoe.errors import EpmoeError
from epmoe.migrate import capsule, config

GOOD = {
    "modes": {"*": "shadow", "pre_reorder": "triton", "silu_and_mul_triton_kernel": "off"},
    "settings": {"*": {"rate": 0.5, "first_per_shape": 2}, "post_reorder": {"max_ulp": 2, "strict": True}},
    "record": {"folder": "kept", "rate": 1, "max_bytes": 100000, "min_free_bytes": 0},
}


class Config(Case):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.path = self.folder / config.NAME

    def write(self, content):
        text = content if isinstance(content, str) else json.dumps(content)
        self.path.write_text(text)
        return self.path

    def modes(self):
        return {name: stats["mode"] for name, stats in shim.stats().items()}

    def test_what_it_says_is_done(self):
        shim.install(config=self.write(GOOD))
        modes = self.modes()
        self.assertEqual(modes["post_reorder_triton_kernel"], "shadow")
        self.assertEqual(modes["pre_reorder_triton_kernel"], "triton")
        self.assertEqual(modes["silu_and_mul_triton_kernel"], "off")
        self.assertIn(str(self.path), self.stats()["chosen_by"])
        self.launch(self.stack.layer.post_reorder_triton_kernel, combine_call())
        held = [capsule.load(path) for path in (self.folder / "kept").iterdir()]
        self.assertEqual([each.kernel for each in held], ["post_reorder_triton_kernel"])
        shim.record(None)

    def test_the_variable_names_one_and_what_is_said_in_code_wins(self):
        os.environ["EPMOE_MIGRATE"] = str(self.write(GOOD))
        shim.install(mode="epmoe", pre_reorder="shadow")
        self.assertEqual(self.modes()["post_reorder_triton_kernel"], "epmoe")
        self.assertEqual(self.modes()["pre_reorder_triton_kernel"], "shadow")
        os.environ["EPMOE_SHIM"] = "*=triton"
        shim.install()
        self.assertEqual(set(self.modes().values()), {"triton"})
        shim.record(None)

    def test_what_is_wrong_is_named_and_nothing_is_done(self):
        for content, words in (
            ("{", r"a file of JSON"),
            ("[]", r"expected an object, received list"),
            ('{"modes": {}, "modes": {}}', r"modes: expected each key once"),
            ({"mode": {}}, r"mode: expected one of .*received the unknown key 'mode'. Did you mean modes\?"),
            ({"modes": {"post_reoder": "triton"}}, r"modes\.post_reoder: .*Did you mean post_reorder\?"),
            ({"modes": {"*": "cuda"}}, r"modes\.\*: expected triton, epmoe, shadow, off, received 'cuda'"),
            ({"modes": {"*": ["triton"]}}, r"modes\.\*: "),
            ({"settings": {"*": {"rates": 1}}}, r"settings\.\*\.rates: .*Did you mean rate\?"),
            ({"settings": {"*": {"rate": 2}}}, r"settings\.\*\.rate: expected a number from 0 to 1, received 2"),
            ({"settings": {"post_reorder": 1}}, r"settings\.post_reorder: expected an object, received int"),
            ({"record": {}}, r"record\.folder: expected the folder"),
            ({"record": {"folder": "x", "max_byte": 1}}, r"record\.max_byte: .*Did you mean max_bytes\?"),
            ({"record": {"folder": "x", "max_bytes": True}}, r"record\.max_bytes: expected a whole number"),
            ({"record": {"folder": "x", "rate": -1}}, r"record\.rate: expected a number from 0 to 1"),
        ):
            before = self.modes()
            with self.subTest(content), self.assertRaisesRegex(EpmoeError, words) as caught:
                shim.install(config=self.write(content))
            self.assertEqual(caught.exception.code, "ERR_CONFIG")
            self.assertEqual(self.modes(), before)
            self.assertFalse(shim.is_installed())
        with self.assertRaisesRegex(EpmoeError, "FileNotFoundError"):
            shim.apply(self.folder / "absent.json")

    def test_modes_are_written_whole_or_not_at_all(self):
        config.set_modes(self.path, {"post_reorder": "shadow"})
        self.assertEqual(config.read(self.path).modes, {"post_reorder": "shadow"})
        self.write(GOOD)
        config.set_modes(self.path, {"post_reorder": "epmoe"})
        found = config.read(self.path)
        self.assertEqual(found.modes, {**GOOD["modes"], "post_reorder": "epmoe"})
        self.assertEqual(found.settings, GOOD["settings"])
        self.assertEqual(config.set_modes(self.path, {"*": "triton"}).modes, {"*": "triton"})
        text = self.path.read_text()
        for broken in (
            mock.patch.object(os, "replace", side_effect=OSError(28, "No space left on device")),
            mock.patch.object(config, "checked", side_effect=EpmoeError("ERR_CONFIG")),
        ):
            with broken, self.assertRaises((OSError, EpmoeError)):
                config.set_modes(self.path, {"*": "epmoe"})
        self.assertEqual((self.path.read_text(), os.listdir(self.folder)), (text, [config.NAME]))

    def test_a_running_process_follows_the_file(self):
        shim.install(config=self.write({"modes": {"*": "shadow"}}))
        end = shim.watch(self.path, seconds=0.01)
        self.addCleanup(end)
        config.set_modes(self.path, {"*": "triton"})
        self.until(lambda: shim.get_mode("post_reorder") == "triton")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self.write("{")
            self.until(lambda: told)
        self.assertIn("is left unapplied", str(told[0].message))
        self.assertEqual(shim.get_mode("post_reorder"), "triton")
        end()
        before = shim.get_mode("post_reorder")
        self.write({"modes": {"*": "epmoe"}})
        time.sleep(0.05)
        self.assertEqual(shim.get_mode("post_reorder"), before)

    def until(self, condition):
        for _ in range(1000):
            if condition():
                return
            time.sleep(0.01)
        self.fail("it never came")

    def test_a_disk_that_is_nearly_full_is_left_alone(self):
        shim.install(mode="triton")
        shim.record(self.folder / "kept", first_per_shape=1, min_free_bytes=1 << 62)
        self.launch(self.stack.layer.post_reorder_triton_kernel, combine_call())
        stats = self.stats()
        self.assertEqual((stats["record_failures"], stats["recorded"], stats["triton"]), (1, 0, 1))
        self.assertIn("are to be left", shim.events()[-1]["what"])
        self.assertEqual(os.listdir(self.folder / "kept"), [])


if __name__ == "__main__":
    unittest.main()
