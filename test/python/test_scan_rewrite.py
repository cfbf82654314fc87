"""epmoe.migrate.scan: the rewrite keeps every other byte, leads back, is written whole or not at all, and runs."""

import ast
import importlib
import itertools
import os
import random
import re
import shutil
import stat
import sys
import unittest
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from serving_stack import Stack
from test_scan import A_CALL, FROM, LAUNCH, LAYERS, Case, kernels_of
from test_shim import inputs

from epmoe import shim
from epmoe._shim import forms, helpers, signatures
from epmoe.migrate import scan as scan_module
from epmoe.migrate._scan import rewrite, sources
from epmoe.migrate.scan import scan

IMPORT = "from epmoe.shim import drop_in"
DROPPED = LAUNCH.replace("post_reorder_triton_kernel", "drop_in(post_reorder_triton_kernel)")


class Unwrap(ast.NodeTransformer):
    """Takes the rewrite out of a syntax tree."""

    def visit_Call(self, node):
        self.generic_visit(node)
        return node.args[0] if isinstance(node.func, ast.Name) and "drop_in" in node.func.id else node

    def visit_ImportFrom(self, node):
        return None if node.module == "epmoe.shim" else node


class Rewriting(Case):
    def rewritten(self, source):
        """Rewrites, and checks what holds for every file: only additions, a second run does nothing, the way back."""
        data = source if isinstance(source, bytes) else source.encode()
        file = self.put("layer.py", b"")
        file.write_bytes(data)
        first = self.scan(action="write", diff=True)
        self.assertEqual(first["problems"], [])
        self.assertEqual(first["summary"]["ready"], 0)
        after = file.read_bytes()
        compile(after, str(file), "exec")
        again = self.scan(action="write")
        self.assertEqual((again["changes"], file.read_bytes()), ([], after))
        self.assertTrue(_is_subsequence(data, after))
        ends = [set(re.findall(rb"\r\n|\r|\n", text)) for text in (data, after)]
        self.assertEqual(ends[0] or ends[1], ends[1])
        self.assertEqual(
            ast.dump(ast.fix_missing_locations(Unwrap().visit(ast.parse(after)))), ast.dump(ast.parse(data))
        )
        self.scan(action="revert")
        self.assertEqual(file.read_bytes(), data)
        self.assertEqual(self.scan(action="revert")["changes"], [])
        return after if isinstance(source, bytes) else after.decode()

    def test_where_the_import_goes(self):
        call = LAUNCH.strip()
        new = DROPPED.strip()
        cases = {
            "beside the import": (
                f"import a\n{FROM}\nimport b\n\n{call}\n",
                f"import a\n{FROM}\n{IMPORT}\nimport b\n\n{new}\n",
            ),
            "in its block": (
                f"def f():\n\tif x:\n\t\t{FROM}  # here\n\n\t\t{call}\n",
                f"def f():\n\tif x:\n\t\t{FROM}  # here\n\t\t{IMPORT}\n\n\t\t{new}\n",
            ),
            "in both": (
                f"try:\n    {FROM}\nexcept E:\n    from n import post_reorder_triton_kernel\n{call}\n",
                f"try:\n    {FROM}\n    {IMPORT}\nexcept E:\n    from n import post_reorder_triton_kernel\n"
                f"    {IMPORT}\n{new}\n",
            ),
            "once a block": (
                f"{FROM}\nfrom m import ep_gather\nep_gather(a, b, c, d, e)\n{call}\n",
                f"{FROM}\n{IMPORT}\nfrom m import ep_gather\ndrop_in(ep_gather)(a, b, c, d, e)\n{new}\n",
            ),
            "over several lines": (
                f"from m import (  # these\n    post_reorder_triton_kernel,\n)\n{call}\n",
                f"from m import (  # these\n    post_reorder_triton_kernel,\n)\n{IMPORT}\n{new}\n",
            ),
            "over a backslash": (
                f"import m \\\n  as n\nn.{call}\n",
                f"import m \\\n  as n\n{IMPORT}\n{new.replace('post', 'n.post', 1)}\n",
            ),
            "one line": (f"if x: {FROM}\n{call}\n", f"if x: {FROM}; {IMPORT}\n{new}\n"),
            "among others": (f"import a; {FROM}; import b\n{call}\n", f"import a; {FROM}; {IMPORT}; import b\n{new}\n"),
            "before a backslash": (f"{FROM} \\\n\n{call}\n", f"{FROM}; {IMPORT} \\\n\n{new}\n"),
            "after a backslash": (f"if x: \\\n  {FROM}\n{call}\n", f"if x: \\\n  {FROM}; {IMPORT}\n{new}\n"),
            "last line": (f"def f(): {call}\n{FROM}", f"def f(): {new}\n{FROM}\n{IMPORT}"),
            "last line in a block": (
                f"def f(): {call}\nif x:\n  {FROM} # c",
                f"def f(): {new}\nif x:\n  {FROM} # c\n  {IMPORT}",
            ),
            "CRLF": (f"{FROM}\r\n{call}\r\n", f"{FROM}\r\n{IMPORT}\r\n{new}\r\n"),
            "CR": (f"{FROM}\r{call}\r", f"{FROM}\r{IMPORT}\r{new}\r"),
            "form feed": (f"import a\n\f{FROM}\n\f\n{call}\n", f"import a\n\f{FROM}\n{IMPORT}\n\f\n{new}\n"),
            "no import to go by": (
                f'#!/bin/python\n"""d"""\nfrom __future__ import annotations\nimport a\nx = 1\ndef f(k): k.{call}\n',
                f'#!/bin/python\n"""d"""\nfrom __future__ import annotations\nimport a\n{IMPORT}\nx = 1\n'
                f"def f(k): {new.replace('post', 'k.post', 1)}\n",
            ),
            "no import at all": (
                f"# c\n\n@d\ndef f(k): k.{call}\n",
                f"# c\n\n{IMPORT}\n@d\ndef f(k): {new.replace('post', 'k.post', 1)}\n",
            ),
            "a docstring alone": (
                f"'doc'; x = 1\ndef f(k): k.{call}\n",
                f"'doc'; {IMPORT}; x = 1\ndef f(k): {new.replace('post', 'k.post', 1)}\n",
            ),
            "for types only": (
                f"import a\nif TYPE_CHECKING:\n    {FROM}\n{call}\n",
                f"import a\n{IMPORT}\nif TYPE_CHECKING:\n    {FROM}\n{new}\n",
            ),
            "made global": (
                f"import a\ndef f():\n    global post_reorder_triton_kernel\n    {FROM}\ndef g(): {call}\n",
                f"import a\n{IMPORT}\ndef f():\n    global post_reorder_triton_kernel\n    {FROM}\ndef g(): {new}\n",
            ),
            "in a class": (
                f"import a\nclass A:\n    {FROM}\n    def f(self): self.{call}\n",
                f"import a\n{IMPORT}\nclass A:\n    {FROM}\n    def f(self): {new.replace('post', 'self.post', 1)}\n",
            ),
            "in parentheses": (f"{FROM}\n( # which\n {call.replace('[', ' ) [', 1)}\n", None),
            "its name is taken": (
                f"{FROM}\ndrop_in = 3\n{call}\n",
                f"{FROM}\n{IMPORT} as epmoe_drop_in\ndrop_in = 3\n{new.replace('drop', 'epmoe_drop', 1)}\n",
            ),
            "a choice": (
                f"{FROM} as a, post_reorder_triton_kernel as b\n(a if new else b)[g]{A_CALL}\n",
                f"{FROM} as a, post_reorder_triton_kernel as b\n{IMPORT}\n(drop_in(a if new else b))[g]{A_CALL}\n",
            ),
            "only what is ready": (
                f"{FROM}\n{call}\npost_reorder_triton_kernel[g](*args)\nuse(post_reorder_triton_kernel)\n",
                f"{FROM}\n{IMPORT}\n{new}\npost_reorder_triton_kernel[g](*args)\nuse(post_reorder_triton_kernel)\n",
            ),
        }
        for what, (before, expected) in cases.items():
            with self.subTest(what):
                after = self.rewritten(before)
                if expected is not None:
                    self.assertEqual(after, expected)

    def test_what_is_added_later_is_rewritten_and_all_of_it_leads_back(self):
        file = self.put("layer.py", f"{FROM}\n{LAUNCH}")
        self.scan(action="write")
        file.write_text(
            file.read_text() + f"def f():\n    from m import ep_gather\n    ep_gather(a, b, c, d, e)\n{LAUNCH}"
        )
        self.assertEqual(self.scan(action="write")["summary"], {"ready": 0, "blocked": 0, "migrated": 3})
        self.assertEqual(file.read_text().count(IMPORT), 2)
        self.scan(action="revert")
        self.assertEqual(
            file.read_text(),
            f"{FROM}\n{LAUNCH}def f():\n    from m import ep_gather\n    ep_gather(a, b, c, d, e)\n{LAUNCH}",
        )

    def test_formatted_since_it_still_leads_back_and_other_uses_keep_the_import(self):
        file = self.put("layer.py", f"{IMPORT}\n{FROM}\ndrop_in(\n    post_reorder_triton_kernel,\n)[(4,)]{A_CALL}\n")
        self.scan(action="revert")
        self.assertEqual(file.read_text(), f"{FROM}\n{LAUNCH}")
        file.write_text(f"{FROM}\n{IMPORT}\n{DROPPED}keep(drop_in)\n")
        self.scan(action="revert")
        self.assertEqual(file.read_text(), f"{FROM}\n{IMPORT}\n{LAUNCH}keep(drop_in)\n")

    def test_encodings_are_kept(self):
        for data in (
            b"\xef\xbb\xbf" + f"# ä😀\n{FROM}\nx = 'ö'; {LAUNCH}".encode(),
            f"# coding: latin-1\n{FROM}\nx = 'öß'; {LAUNCH}".encode("latin-1"),
            f"# -*- coding: shift_jis -*-\n{FROM}\nx = '表'; {LAUNCH}".encode("shift_jis"),
            f"# coding: utf-8\r\n{FROM}\r\nx = '\u2028\x0c\x1c'; {LAUNCH}".encode(),
        ):
            with self.subTest(data[:30]):
                self.assertIn(b"drop_in(post_reorder_triton_kernel)[", self.rewritten(data))

    def test_every_version_s_layer(self):
        for version, (layer, sites) in LAYERS.items():
            with self.subTest(version):
                self.setUp()
                self.put("sglang/srt/layers/moe/ep_moe/kernels.py", kernels_of(version))
                self.assertEqual(self.rewritten(layer.replace("\n        ", "\n")).count("drop_in("), len(sites))

    def test_any_layout(self):
        """Sources put together at random: whatever the white space, only the rewrite is added, and it leads back."""
        rng = random.Random(7)
        seen = set()
        for _ in range(400):
            source, marks = layout(rng)
            ast.parse(source)
            seen |= marks
            with self.subTest(source):
                after = self.rewritten(source.encode(rng.choice(["utf-8", "utf-8-sig"])))
                self.assertEqual(after.count(b"drop_in("), source.count("(down"))
        self.assertEqual(seen, {"\n", "\r\n", "\r", "tab", "form feed", "comment", "backslash", "one line", "no end"})

    def test_a_rewrite_that_would_spoil_the_file_is_not_written(self):
        source = f"{FROM}\n{LAUNCH}x = 1\n"
        file = self.put("layer.py", source)
        real = rewrite.rewritten
        for spoil in (
            lambda text: text.replace("x = 1", "x = 2"),  # not only added to
            lambda text: text.replace("x = 1", "x = ("),  # does not compile
            lambda text: text.replace("x = 1", "return"),  # parses, and does not compile
        ):
            with mock.patch.object(rewrite, "rewritten", lambda *a, spoil=spoil: (spoil(real(*a)[0]), [])):
                report = self.scan(action="write")
            self.assertEqual([each["kind"] for each in report["problems"]], ["not-written"])
            self.assertEqual((report["changes"], file.read_text()), ([], source))
        self.assertEqual(len(self.scan(action="write")["changes"]), 1)


def layout(rng):
    """A module with a launch or two, laid out at random, and what of note it has."""
    end = rng.choice(["\n", "\r\n", "\r"])
    indent = rng.choice([" ", "  ", "    ", "\t", " \t"])
    marks = {end} | ({"tab"} if "\t" in indent else set())

    def space():
        if rng.random() < 0.1:
            marks.add("backslash")
            return f" \\{end} "
        return rng.choice(["", "", " ", "  ", "\t"])

    def inside():
        if rng.random() < 0.2:
            marks.add("comment")
            return f"{space()}# post_reorder_triton_kernel[(4,)](a) ä😀{end}{rng.choice(['', ' ', indent])}"
        return rng.choice(["", " ", end, f"{end}{indent}"])

    def close():
        return rng.choice(["", "", " ", "  # done", "\t#"])

    def call(name):
        opened, closed = rng.choice([("", ""), ("", ""), ("(", ")")])
        callee = f"{opened}{inside()}{name}{inside()}{closed}" if opened else name
        given = [
            f"down{inside()}",
            "out",
            "src2dst",
            "ids",
            "weights",
            "first",
            "last",
            "topk",
            "hidden",
            "BLOCK_SIZE=512",
        ]
        between = "," + (inside() if rng.random() < 0.5 else " ")
        return f"{callee}{space()}[{inside()}(4,){inside()}]{space()}({between.join(given)})"

    kernel = "post_reorder_triton_kernel"
    bound = rng.choice([kernel, "k", "m"])
    imported = f"from{' '}a.b import{' '}{kernel}" + ("" if bound == kernel else f" as {bound}")
    name = bound
    if bound == "m":
        imported, name = "from a import m", f"m{space()}.{space()}{kernel}"
    elif rng.random() < 0.3:
        imported = imported.replace("import ", f"import ({inside()}", 1) + f"{inside()})"
    lines = []
    if rng.random() < 0.3:
        lines.append(rng.choice(['"""ä"""', "'''doc" + end + "'''", "# 😀"]))
    lines += [f"import os{close()}"] * rng.randint(0, 2)
    shape = rng.choice(["plain", "function", "try", "one line", "semicolons"])
    if shape == "plain":
        lines += [imported + close(), "", f"x = 'ö😀', {call(name)}{close()}"]
    elif shape == "function":
        lines += [f"def f():{close()}", f"{indent}{imported}{close()}", f"{indent}return {call(name)}{close()}"]
    elif shape == "try":
        lines += ["try:", indent + imported + close(), "except E:", f"{indent}{bound} = None", call(name), call(name)]
    elif shape == "one line":
        marks.add("one line")
        lines += [f"if x: {imported}{close()}", f"while y: {call(name)}; z = 'ö'{close()}"]
    else:
        lines += [f"a = 1;{space()}{imported};{space()}b = 'ß';{space()}{call(name)}"]
    gaps = [rng.choice(["", "", end, "\f" + end]) for _ in lines]
    if any("\f" in gap for gap in gaps[:-1]):
        marks.add("form feed")
    last = rng.choice([end, ""])
    if not last:
        marks.add("no end")
    body = "".join(line + end + gap for line, gap in zip(lines[:-1], gaps, strict=False))
    return body + lines[-1] + last, marks


def _is_subsequence(part, whole):
    rest = iter(whole)
    return all(byte in rest for byte in part)


class Writing(Case):
    def setUp(self):
        super().setUp()
        self.file = self.put("layer.py", f"{FROM}\n{LAUNCH}")

    def test_mode_and_links_are_kept_and_nothing_is_left_beside(self):
        self.file.chmod(0o751)
        (self.root / "links").mkdir()
        link = self.root / "links/layer.py"
        link.symlink_to("../layer.py")
        (change,) = self.scan(link, action="write")["changes"]
        self.assertEqual((change["sites"], change["written"]), (1, True))
        self.assertTrue(link.is_symlink())
        self.assertEqual(stat.S_IMODE(self.file.stat().st_mode), 0o751)
        self.assertIn(DROPPED, self.file.read_text())
        self.assertEqual(sorted(os.listdir(self.root)), ["layer.py", "links"])
        self.assertEqual(os.listdir(self.root / "links"), ["layer.py"])

    def test_looking_writes_nothing(self):
        before = self.file.read_bytes(), self.file.stat().st_mtime_ns
        (change,) = self.scan(diff=True)["changes"]
        self.assertIn(f"+{DROPPED}", change["diff"])
        self.assertFalse(change["written"])
        self.assertEqual((self.file.read_bytes(), self.file.stat().st_mtime_ns), before)

    def test_the_diff_is_one_that_patch_takes(self):
        self.file.write_text(f"{FROM}\n\n\nx = 1\n{LAUNCH}".rstrip())
        (change,) = self.scan(diff=True)["changes"]
        self.assertTrue(change["diff"].endswith("\\ No newline at end of file\n"))
        self.assertEqual(change["diff"].count("\\ No newline"), 2)

    def test_a_full_disk_a_locked_folder_and_a_change_meanwhile_leave_the_file(self):
        before = self.file.read_bytes()

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        def edited(path, was, new, real=sources.write):
            self.file.write_bytes(before + b"# mine\n")
            real(path, was, new)

        for module, name, instead, said in (
            (sources.os, "fsync", full, "No space left"),
            (sources.tempfile, "mkstemp", full, "No space left"),
            (sources.os, "replace", full, "No space left"),
            (scan_module, "write", edited, "changed since"),
        ):
            with mock.patch.object(module, name, instead):
                report = self.scan(action="write")
            (problem,) = report["problems"]
            self.assertEqual(problem["kind"], "not-written")
            self.assertIn(said, problem["reason"])
            self.assertEqual(report["summary"]["ready"], 1)
            self.assertEqual(self.file.read_bytes().removesuffix(b"# mine\n"), before)
            self.assertEqual(os.listdir(self.root), ["layer.py"])

    def test_one_file_that_cannot_be_written_keeps_no_other_from_it(self):
        self.put("other.py", f"{FROM}\n{LAUNCH}")
        real = os.replace

        def refusing(source, target):
            if target.endswith("layer.py"):
                raise PermissionError(13, "Permission denied")
            real(source, target)

        with mock.patch.object(sources.os, "replace", refusing):
            report = self.scan(action="write")
        self.assertEqual(report["summary"], {"ready": 1, "blocked": 0, "migrated": 1})
        self.assertEqual([Path(each["file"]).name for each in report["problems"]], ["layer.py"])


class Running(Case):
    """Rewritten modules, with interpreted kernels."""

    numbers = itertools.count()

    def setUp(self):
        super().setUp()
        self.stack = Stack(self)
        shim.set_mode("*", "epmoe")
        shim.reset()
        self.addCleanup(shim.configure, rate=0.01, max_ulp=0)
        self.addCleanup(shim.set_mode, "*", "epmoe")

    def rewritten(self):
        """The layer once more, under another name, rewritten; and what its source was."""
        package = self.root / f"rewritten_{next(self.numbers)}"
        shutil.copytree(Path(self.stack.layer.__file__).parent, package)
        report = scan([package], action="write")
        self.assertEqual(report["summary"], {"ready": 0, "blocked": 0, "migrated": 4})
        sys.path.insert(0, str(self.root))
        self.addCleanup(sys.path.remove, str(self.root))
        self.addCleanup(self.forget, package.name)
        return importlib.import_module(f"{package.name}.layer")

    def forget(self, package):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]

    def test_it_gives_what_the_original_gives_in_every_mode(self):
        layer = self.rewritten()
        self.assertIn("drop_in(permute)[", Path(layer.__file__).read_text())
        arguments = (*inputs(tokens=6), 4)
        expected = self.stack.layer.forward(*arguments)
        for mode in ("epmoe", "shadow", "triton", "off"):
            with self.subTest(mode):
                shim.reset()
                shim.configure(rate=1)
                shim.configure("silu_and_mul", max_ulp=2)
                shim.set_mode("*", mode)
                output, activated, src2dst = layer.forward(*arguments)
                self.assertTrue(torch.equal(output, expected[0]) and torch.equal(src2dst, expected[2]))
                # The interpreter's exp is another: see max_ulp.
                torch.testing.assert_close(activated, expected[1], rtol=1e-6, atol=1e-6)
                stats = shim.stats()
                for name in ("post_reorder_triton_kernel", "pre_reorder_triton_kernel", "run_moe_ep_preproess"):
                    self.assertEqual(stats[name]["launches"], 0 if mode == "off" else 1)
                    self.assertEqual(stats[name]["epmoe"], 1 if mode == "epmoe" else 0)
                    self.assertEqual(stats[name]["mismatches"] + stats[name]["fallbacks"], 0)
        # Other inputs give other results, and the original's module is as it was.
        other = (*inputs(tokens=6, seed=1), 4)
        self.assertFalse(torch.equal(layer.forward(*other)[0], expected[0]))
        self.assertNotIsInstance(self.stack.layer.permute, type(shim.pre_reorder_triton_kernel))

    def test_drop_in(self):
        kernel, helper = self.stack.a.post_reorder_triton_kernel, self.stack.a.run_moe_ep_preproess
        dropped = shim.drop_in(kernel)
        self.assertIsInstance(dropped, type(shim.post_reorder_triton_kernel))
        self.assertIs(shim.drop_in(kernel), dropped)
        self.assertIs(shim.drop_in(dropped), dropped)
        self.assertIs(dropped.original(), kernel)
        self.assertIs(shim.drop_in(helper).original(), helper)
        self.assertIsNot(shim.drop_in(self.stack.b.post_reorder_triton_kernel), dropped)
        for other in (None, 3, len, self.stack, torch.add, lambda: None):
            self.assertIs(shim.drop_in(other), other)

        def ep_gather(something, different):
            return something

        with self.assertWarnsRegex(RuntimeWarning, "ep_gather is left as it is: its signature is not known"):
            self.assertIs(shim.drop_in(ep_gather), ep_gather)
        self.assertIs(shim.drop_in(ep_gather), ep_gather)

    def test_drop_in_and_install_do_not_disturb_each_other(self):
        kernel = self.stack.a.post_reorder_triton_kernel
        shim.drop_in(kernel)
        self.assertFalse(shim.is_installed())
        self.addCleanup(shim.uninstall)
        shim.install([self.stack.a])
        self.assertIs(shim.drop_in(self.stack.a.post_reorder_triton_kernel), self.stack.a.post_reorder_triton_kernel)
        shim.uninstall()
        self.assertIs(self.stack.a.post_reorder_triton_kernel, kernel)


class Mapping(unittest.TestCase):
    """What a site's arguments are said to become is what the shim makes of them."""

    def test_kernels(self):
        for name, known in signatures.KERNELS.items():
            for form in known:
                with self.subTest(name, generation=form.generation):
                    values = {each: self.value(each) for each in form.names}
                    call = forms.TRANSLATE[name](values, 3, "triton")
                    self.assertEqual(call.op, form.op)
                    self.check(form, values, call.arguments)

    def test_helpers(self):
        sizes = {"quant_group_size": 128, "num_experts": 4, "num_tokens": 3, "topk": 2, "hidden_size": 8}
        for name, form in signatures.HELPERS.items():
            with self.subTest(name):
                values = {each: sizes.get(each, torch.zeros(128, 2, 256, dtype=torch.int32)) for each in form.names}
                values["routed_scaling_factor"] = 2.0
                values["m_indices"] = torch.zeros(128, dtype=torch.int32)
                if "num_experts" in form.names:
                    values["topk_ids"] = torch.zeros(3, 2, dtype=torch.int32)
                if name == "post_reorder_deepgemm":
                    values |= {
                        each: torch.zeros(64)
                        for each in ("down_output", "output", "src2dst", "topk_ids", "topk_weights")
                    }
                call = helpers.TRANSLATE[name](values, None, "triton")
                self.assertEqual(call.op, form.op)
                self.check(form, {each: values[each] for each in form.names}, call.arguments)

    def value(self, name):
        sizes = {
            "topk": 2,
            "hidden_size": 8,
            "BLOCK_SIZE": 64,
            "start_expert_id": 1,
            "end_expert_id": 5,
            "dst_start": 0,
        }
        further = {"use_per_token_if_dynamic": True, "routed_scaling_factor": 2.0}
        return sizes.get(name, further.get(name, torch.zeros(64)))

    def check(self, form, values, arguments):
        for name, value in values.items():
            own = form.arguments.get(name)
            if own is None:
                held = [
                    each for each, other in arguments.items() if isinstance(value, torch.Tensor) and _same(value, other)
                ]
                self.assertEqual(held, [], f"{name} is not said to become {held}")
            elif isinstance(value, torch.Tensor):
                self.assertTrue(_same(value, arguments[own]), f"{name} is said to become {own}")
            elif own != "scale_axis":
                self.assertEqual(arguments[own], value, name)
            else:
                self.assertEqual(arguments[own], "token")


def _same(one, other):
    return isinstance(other, torch.Tensor) and one.data_ptr() == other.data_ptr()


if __name__ == "__main__":
    unittest.main()
