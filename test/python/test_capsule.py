"""Capsules: what is written is read; whatever is damaged or made up is refused with its name; the ring on disk."""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

import safetensors
import torch

from epmoe.errors import EpmoeError
from epmoe.migrate import capsule
from epmoe.migrate.capsule import Capsule, CapsuleError, Ring

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(capsule.__file__).parents[2])}


def make(size=4, **more):
    return Capsule(
        kernel="post_reorder_triton_kernel",
        generation="B",
        op="post_reorder",
        scalars={"dst_start": 3, "routed_scaling_factor": 2.5, "numerics": "triton"},
        launch={"grid": [size], "options": {"num_warps": 4}, "arguments": {}},
        environment=capsule.environment(),
        findings=[{"output": "output", "mismatched": 1}],
        tensors={
            "argument": {
                "down_output": torch.randn(size, 6).bfloat16(),
                "src2dst": torch.arange(size),
                "strided": torch.arange(12.0).view(3, 4).t(),
                "scalar": torch.tensor(2.5),
                "empty": torch.empty(0, 4),
                "float8": torch.randn(8).to(torch.float8_e4m3fn),
            },
            "triton": {"output": torch.full((size, 6), float("nan"))},
        },
        **more,
    )


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and bits(a) == bits(b)


def bits(tensor):
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def equal(a, b):
    fields = ("kernel", "generation", "op", "reason", "scalars", "launch", "environment", "findings", "time")
    if any(getattr(a, name) != getattr(b, name) for name in fields) or a.tensors.keys() != b.tensors.keys():
        return False
    return all(
        a.tensors[part].keys() == b.tensors[part].keys()
        and all(same(tensor, b.tensors[part][name]) for name, tensor in a.tensors[part].items())
        for part in a.tensors
    )


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.path = self.folder / "one.safetensors"

    def refuse(self, data, words=".", path=None):
        self.path.write_bytes(data)
        with self.assertRaises(CapsuleError) as caught:
            capsule.load(path or self.path)
        self.assertIsInstance(caught.exception, EpmoeError)
        self.assertEqual((caught.exception.code, caught.exception.argument), ("ERR_CAPSULE", str(path or self.path)))
        self.assertIn(str(path or self.path), str(caught.exception))
        self.assertRegex(str(caught.exception), words)


class Files(Case):
    def test_there_and_back(self):
        written = make()
        self.assertEqual(capsule.save(self.path, written), self.path)
        read = capsule.load(self.path)
        self.assertTrue(equal(written, read))
        read.tensors["triton"]["output"][0, 0] = 1
        self.assertFalse(equal(written, read))
        self.assertEqual(capsule.load(str(self.path)).part("before"), {})
        self.assertEqual(os.listdir(self.folder), ["one.safetensors"])

    def test_the_package_reads_it(self):
        written = make()
        capsule.save(self.path, written)
        with safetensors.safe_open(self.path, "pt") as file:
            self.assertIn("argument/src2dst", file.keys())
            self.assertTrue(torch.equal(file.get_tensor("argument/src2dst"), torch.arange(4)))
            self.assertEqual(json.loads(file.metadata()["epmoe.capsule"])["kernel"], written.kernel)

    def test_tensors_that_share_memory_and_bad_names(self):
        memory = torch.arange(10.0)
        shared = Capsule("k", tensors={"argument": {"a": memory[:6], "b": memory[4:]}})
        capsule.save(self.path, shared)
        self.assertTrue(torch.equal(capsule.load(self.path).part("argument")["b"], memory[4:]))
        for name in ("../etc/passwd", "a/b", "", "a b", "é"):
            with self.subTest(name), self.assertRaises(CapsuleError):
                capsule.save(self.path, Capsule("k", tensors={"argument": {name: memory}}))
        with self.assertRaises(CapsuleError):
            capsule.save(self.path, Capsule("k", tensors={"elsewhere": {"a": memory}}))

    def test_without_the_package(self):
        code = (
            "import sys; sys.modules['safetensors'] = None\n"
            "from epmoe.migrate import capsule\n"
            "try: capsule.save('x', capsule.Capsule('k'))\n"
            "except capsule.CapsuleError as error: print(error)\n"
        )
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=self.folder, env=ENVIRONMENT
        )
        self.assertIn("pip install safetensors", found.stdout, found.stderr)
        self.assertEqual(os.listdir(self.folder), [])


class Hostile(Case):
    def setUp(self):
        super().setUp()
        self.written = make()
        capsule.save(self.path, self.written)
        self.data = self.path.read_bytes()
        self.written = capsule.load(self.path)

    def test_every_flipped_bit_is_noticed(self):
        chooser = random.Random(0)
        positions = {*range(64), *(chooser.randrange(len(self.data)) for _ in range(1500))}
        for at in sorted(positions):
            data = bytearray(self.data)
            data[at] ^= 1 << chooser.randrange(8)
            self.survive(bytes(data))
        for _ in range(300):  # several bytes at once, and bytes put in or taken out
            data = bytearray(self.data)
            for _ in range(chooser.randrange(1, 5)):
                at = chooser.randrange(len(data))
                data[at : at + chooser.randrange(3)] = chooser.randbytes(chooser.randrange(3))
            self.survive(bytes(data))

    def survive(self, data):
        """An error that names the file, or, where the change means nothing, the same capsule."""
        self.path.write_bytes(data)
        try:
            found = capsule.load(self.path)
        except CapsuleError as error:
            self.assertIn(str(self.path), str(error))
        else:
            self.assertTrue(equal(found, self.written), "a changed capsule was read")

    def test_every_length_it_may_be_cut_to(self):
        for length in [*range(0, 40), *range(40, len(self.data), 23), len(self.data) - 1]:
            self.refuse(self.data[:length])
        self.refuse(self.data + b"\0")

    def header(self, change):
        """The file with its header changed."""
        length = int.from_bytes(self.data[:8], "little")
        found = json.loads(self.data[8 : 8 + length])
        text = json.dumps(change(found) or found).encode()
        return len(text).to_bytes(8, "little") + text + self.data[8 + length :]

    def test_made_up_headers(self):
        def set_name(found):
            found["../../etc/passwd"] = found.pop("argument/src2dst")

        def set_offsets(begin, end):
            def change(found):
                found["argument/src2dst"]["data_offsets"] = [begin, end]

            return change

        def set_value(key, value):
            def change(found):
                found["argument/src2dst"][key] = value

            return change

        def without_metadata(found):
            del found["__metadata__"]

        def other_content(found):
            description = json.loads(found["__metadata__"]["epmoe.capsule"])
            found["__metadata__"]["epmoe.capsule"] = json.dumps({**description, "scalars": {}})

        self.refuse(self.header(set_name), "etc/passwd")
        for begin, end in ((0, 2**62), (2**63, 2**64 - 1), (-8, 24), (40, 8), (1, 33)):
            self.refuse(self.header(set_offsets(begin, end)), "safetensors file")
        for key, value in (("shape", [2**40]), ("shape", [-1]), ("dtype", "F99"), ("dtype", "F32"), ("shape", "four")):
            self.refuse(self.header(set_value(key, value)))
        self.refuse(self.header(without_metadata), "without a capsule's metadata")
        self.refuse(self.header(other_content), "damaged or changed")
        self.refuse(self.header(lambda found: [found]), "without a capsule's metadata")
        self.refuse((2**63).to_bytes(8, "little") + self.data[8:], "header that fits")
        self.refuse((8).to_bytes(8, "little") + b"not json" + b"\0" * 8, "header in JSON")
        self.refuse((100_000).to_bytes(8, "little") + b"[" * 100_000, "header in JSON")
        self.refuse(b'\x10\0\0\0\0\0\0\0{"a":1,"a":2}   ', "occurs twice")
        self.refuse(b"")

    def test_right_digests_of_wrong_descriptions(self):
        def described(**more):
            text = json.dumps({"format": 1, "kernel": "k", "generation": "", "op": "", **more})
            metadata = {"epmoe.capsule": text, "epmoe.digest": capsule._digest_of(text, {})}
            return safetensors.serialize({}, metadata)

        self.refuse(described(), "reason in its description")
        self.refuse(described(kernel=5), "kernel in its description")
        self.refuse(described(format=2), "format 1")

    def test_what_is_no_file(self):
        for path in (self.folder / "absent", self.folder, "/dev/zero", "nul\0byte"):
            with self.subTest(path):
                self.refuse(self.data, path=path)
        os.mkfifo(self.folder / "fifo")
        self.refuse(self.data, "device", path=self.folder / "fifo")


class Rings(Case):
    def names(self):
        return sorted(name for name in os.listdir(self.folder))

    def test_oldest_go_first_and_mismatches_last(self):
        one = len(capsule.encode(make()))
        ring = Ring(self.folder, max_bytes=4 * one + 400)
        (self.folder / "notes.txt").write_text("mine")
        (self.folder / "other.safetensors").write_bytes(b"mine too")
        paths = [ring.add(make(reason="mismatch" if i == 0 else "recorded")) for i in range(10)]
        left = [path for path in paths if path.exists()]
        self.assertEqual(left, [paths[0], *paths[-3:]])
        self.assertLessEqual(sum(path.stat().st_size for path in left), ring.max_bytes)
        self.assertTrue({"notes.txt", "other.safetensors"} <= set(self.names()))
        self.assertTrue(all(capsule.load(path).time for path in left))
        more = [ring.add(make(reason="mismatch")) for _ in range(4)]
        self.assertEqual([path for path in [*paths, *more] if path.exists()], more)

    def test_too_large_for_the_ring(self):
        ring = Ring(self.folder, max_bytes=1000)
        with self.assertRaisesRegex(CapsuleError, "max_bytes"):
            ring.add(make())
        self.assertEqual(self.names(), [])

    def test_a_full_disk_leaves_what_was_there(self):
        ring = Ring(self.folder)
        first = ring.add(make())
        for name in ("fsync", "replace"):
            with (
                mock.patch.object(os, name, side_effect=OSError(28, "No space left on device")),
                self.assertRaisesRegex(OSError, "No space"),
            ):
                ring.add(make())
        self.assertEqual(self.names(), [first.name])
        self.assertTrue(ring.add(make()).exists())

    def test_left_overs_of_a_killed_process(self):
        code = (
            "import os, sys; from epmoe.migrate import capsule\n"
            "os.replace = lambda *_: os._exit(9)\n"
            "capsule.Ring(sys.argv[1]).add(capsule.Capsule('k'))\n"
        )
        killed = subprocess.run([sys.executable, "-c", code, str(self.folder)], env=ENVIRONMENT)
        self.assertEqual(killed.returncode, 9)
        left = self.names()
        self.assertEqual(len(left), 1)
        self.assertTrue(left[0].startswith(".tmp-"))
        self.assertEqual(Ring(self.folder).files(), [])
        self.assertEqual(self.names(), left)  # it may be another process that is still writing
        os.utime(self.folder / left[0], (time.time() - 3600,) * 2)
        Ring(self.folder)
        self.assertEqual(self.names(), [])

    def test_threads_share_it(self):
        one = len(capsule.encode(make()))
        ring = Ring(self.folder, max_bytes=6 * one)
        errors = []

        def write():
            try:
                for _ in range(15):
                    ring.add(make())
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=write) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])
        held = ring.files()
        self.assertIn(len(held), (5, 6))
        self.assertLessEqual(sum(size for _, size in held), ring.max_bytes)
        self.assertTrue(all(capsule.load(path).kernel for path, _ in held))

    def test_names_are_of_the_ring(self):
        path = Ring(self.folder).add(Capsule("../../../etc/passwd", reason="../mismatch"))
        self.assertEqual(path.parent, self.folder)
        self.assertTrue(path.name.endswith("-etcpasswd-recorded.safetensors"))


if __name__ == "__main__":
    unittest.main()
