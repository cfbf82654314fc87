"""Ranks that watch each other, in one process on a store of its own: who is blamed, for what, and who is not."""

import subprocess
import sys
import textwrap
import time
import unittest
from pathlib import Path

from epmoe._watch import Watch
from epmoe.errors import EpmoeError

TIMEOUT = 1.2


class Store(dict):
    """As much of a torch store as a watch uses."""

    gone = False

    def set(self, key, value):
        if self.gone:
            raise ConnectionError("gone")
        self[key] = value

    def multi_get(self, keys):
        if self.gone:
            raise ConnectionError("gone")
        return [self[key] for key in keys]


class WatchTest(unittest.TestCase):
    def setUp(self):
        self.store = Store()
        self.watches = [Watch(lambda _: self.store, (0, "and its store"), rank, range(3), TIMEOUT) for rank in range(3)]
        for watch in self.watches:
            watch.start()
        self.addCleanup(self.end)

    def end(self):
        for watch in self.watches:
            watch._stopped.set()

    def kill(self, rank):
        self.watches[rank]._stopped.set()

    def error_of(self, rank, seconds=4 * TIMEOUT):
        """What a rank that waits in a call is told."""
        deadline = time.monotonic() + seconds
        with self.assertRaises(EpmoeError) as caught:
            while True:
                self.watches[rank].check(deadline)
                time.sleep(0.01)
        return caught.exception

    def test_ranks_that_live_are_waited_for_until_the_deadline(self):
        for rank in (0, 2):
            self.watches[rank].enter()
        error = self.error_of(0)
        self.assertEqual(error.code, "ERR_RANK_LATE")
        self.assertIn("rank 1 has come to no call only", str(error))
        self.assertNotIn("rank 2", str(error))

    def test_who_is_told_that_a_rank_is_late_says_so_too(self):
        for rank in (0, 2):
            self.watches[rank].enter()
        first = self.error_of(0, seconds=0)
        told = self.error_of(2, seconds=60)
        self.assertEqual((told.code, str(told)), (first.code, str(first)))

    def test_a_silent_rank_is_lost_within_the_timeout(self):
        self.kill(1)
        for rank in (0, 2):
            self.watches[rank].enter()
            error = self.error_of(rank)
            self.assertEqual(error.code, "ERR_RANK_LOST")
            self.assertIn("rank 1 has given no sign of life", str(error))
            self.assertNotIn("rank 0", str(error))

    def test_the_first_to_know_names_the_culprit_to_the_others(self):
        for watch in self.watches:
            watch.enter()
        self.watches[0].fail(EpmoeError("ERR_RANK_LOST", received="it"), {2: "was seen to burn"})
        error = self.error_of(1)
        self.assertIn("rank 2 was seen to burn", str(error))
        self.assertNotIn("rank 0", str(error))

    def test_a_rank_that_leaves_after_its_part_is_not_missed(self):
        for watch in self.watches:
            watch.enter()
        self.watches[1].stop()
        time.sleep(3 * self.watches[0].interval)
        self.assertEqual(self.watches[0].lost(), {})
        self.watches[0].enter()
        self.assertIn("rank 1 left the job after call 1", str(self.error_of(0)))

    def test_who_was_frozen_does_not_take_the_others_for_dead(self):
        watch = self.watches[0]
        with watch._lock:  # its thread can neither beat nor read
            time.sleep(watch.patience + 3 * watch.interval)
            self.assertEqual(watch.lost(), {})

    def test_a_store_that_is_gone_is_its_keeper_gone(self):
        self.watches[1].enter()
        self.store.gone = True
        self.assertIn("rank 0 and its store cannot be reached any more", str(self.error_of(1)))

    def test_a_broken_group_makes_no_further_call(self):
        self.watches[0].enter()
        first = self.watches[0].fail(EpmoeError("ERR_RANK_LOST", received="it"))
        with self.assertRaises(EpmoeError) as caught:
            self.watches[0].enter()
        self.assertIs(caught.exception, first)


class StuckDeviceTest(unittest.TestCase):
    """The GPU works on for a call that no host waits for: a process of its own, which must end or live."""

    def run_with(self, done, alive):
        program = f"""
            import sys, time
            from test_watch import Store, TIMEOUT
            from epmoe._watch import Watch

            class Event:
                def query(self):
                    return {done}

            store = Store()
            watches = [Watch(lambda _: store, (0, "and its store"), rank, range(2), TIMEOUT) for rank in range(2)]
            for watch in watches:
                watch.start()
                watch.enter()
            if not {alive}:
                watches[1]._stopped.set()
            watches[0].leave(Event())
            time.sleep(4 * TIMEOUT)
            print("lived")
        """
        folder = Path(__file__).parent
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PYTHONPATH": f"{folder}:{folder.parent.parent / 'python'}"},
        )

    def test_it_ends_when_a_rank_is_lost_and_names_it(self):
        result = self.run_with(done=False, alive=False)
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertIn("epmoe: rank 0 ends: ", result.stderr)
        self.assertIn("rank 1 has given no sign of life", result.stderr)
        self.assertNotIn("lived", result.stdout)

    def test_it_lives_while_the_others_do_or_the_work_is_done(self):
        for done, alive in ((False, True), (True, False), (True, True)):
            result = self.run_with(done, alive)
            self.assertEqual((result.returncode, result.stdout), (0, "lived\n"), result.stderr)


if __name__ == "__main__":
    unittest.main()
