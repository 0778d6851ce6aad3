"""How are several things made at once, in order and only a little ahead?"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from support.disk.files import InputError
from support.raw.recipe import Case

Made = TypeVar("Made")
Outcome = tuple[Case, object]


def prefetch(make: Callable[[int], Made], start: int, stop: int, ahead: int = 2) -> Iterator[Made]:
    """make(start), ..., make(stop - 1), made in threads up to `ahead` steps early, so that memory does not
    grow with the data. (Reading, unpacking and resampling let other threads run.)"""
    with ThreadPoolExecutor(max_workers=ahead) as pool:
        waiting: deque = deque()
        for step in range(start, stop):
            waiting.append(pool.submit(make, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def each_case(function: Callable, cases: Sequence[Case], workers: int, what: str) -> Iterator[Outcome]:
    """Every case, in order, with function(case) or the InputError that it raised: the fault of the case, if
    it has one. There are as many threads as `workers`, or, if that is 0, as cores, but no more than 8,
    since each holds a case in memory."""

    def attempt(i: int) -> Outcome:
        case = cases[i]
        try:
            return case, InputError(case.fault) if case.fault else function(case)
        except InputError as error:
            return case, error

    made = prefetch(attempt, 0, len(cases), workers or min(os.cpu_count() or 1, 8))
    yield from tqdm(made, what, len(cases), disable=None)
