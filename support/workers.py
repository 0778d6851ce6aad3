"""How are many cases worked on at once?"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from support.files import InputError
from support.recipe import Case


def attempt(function: Callable, case: Case) -> object:
    """function(case), or the InputError that it raised."""
    try:
        if case.fault:
            raise InputError(case.fault)
        return function(case)
    except InputError as error:
        return error


def each_case(
    function: Callable, cases: Sequence[Case], workers: int, what: str
) -> Iterator[tuple[Case, object]]:
    """Every case with function(case), or with the InputError that it raised, in order. With several
    `workers`, processes that are a few cases ahead, so that memory does not grow with the data."""
    bar = tqdm(cases, desc=what, disable=None)
    if workers == 1:
        for case in bar:
            yield case, attempt(function, case)
        return
    context = multiprocessing.get_context("spawn")  # the threads of JAX do not survive a fork
    waiting: deque = deque()
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            for case in bar:
                waiting.append((case, pool.submit(attempt, function, case)))
                if len(waiting) > 2 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        except BrokenProcessPool as error:
            raise InputError(
                f"{what}: a process died, of too little memory perhaps; try --workers 1"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
