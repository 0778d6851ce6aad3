"""How are several cases processed at once, where that is faster?"""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from support.files import InputError
from support.recipe import Case

Outcome = tuple[Case, object]
WORTHWHILE = 10.0  # seconds that processes shall save; to start takes them five, and longer on busy cores


def attempt(function: Callable, case: Case) -> Outcome:
    """A case with function(case), or with an InputError: the one that this raised, or the case's fault."""
    try:
        return case, InputError(case.fault) if case.fault else function(case)
    except InputError as error:
        return case, error


def each_case(function: Callable, cases: Sequence[Case], workers: int, what: str) -> Iterator[Outcome]:
    """Every case, in order, with function(case) or the InputError that it raised. If there are
    several `workers`, they are processes that run only a few cases ahead, so that memory does not
    grow with the data. With 0 workers, cases are done here, until it is seen that the rest would be
    done earlier by a process per core. Raises InputError where one of them dies."""
    bar = iter(tqdm(cases, desc=what, disable=None))
    if workers == 0:
        workers, seconds = os.cpu_count() or 1, 0.0
        for done, case in enumerate(bar):
            began = time.perf_counter()
            outcome = attempt(function, case)
            # The first case does not count, as it is slow by itself: its code has never run before.
            seconds += time.perf_counter() - began if done else 0
            yield outcome
            left = seconds / max(done, 1) * (len(cases) - 1 - done)
            if left * (1 - 1 / workers) > WORTHWHILE:
                break
        else:
            return
    if workers == 1:
        yield from (attempt(function, case) for case in bar)
        return
    context = multiprocessing.get_context("spawn")  # the threads of JAX do not survive a fork
    waiting: deque = deque()
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            for case in bar:
                waiting.append(pool.submit(attempt, function, case))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            yield from (future.result() for future in waiting)
        except BrokenProcessPool as error:
            why = "a process died, perhaps for lack of memory"
            raise InputError(f"{what}: {why}; try --workers 1") from error
        finally:
            pool.shutdown(cancel_futures=True)
