"""The time of chunks on a worker, which decides how many streams it takes."""

from dataclasses import dataclass

from model.schedule import Schedule

HEADROOM = 0.9  # share of a worker's time that streams may take


@dataclass
class Costs:
    """The time of a chunk on a worker: measured at its start, then a running mean over its chunks."""

    evaluation: float  # seconds of one evaluation of the student
    decode: float  # time of decoding, in evaluations
    frames: int  # pixel frames of a later chunk
    fps: int

    def seconds(self, nfe: int) -> float:
        """Seconds of a chunk with `nfe` evaluations."""
        return self.evaluation * (nfe + self.decode)

    def share(self, schedule: Schedule) -> float:
        """Share of the worker's time that a stream needs to keep its frame rate."""
        return self.seconds(later_nfe(schedule)) * self.fps / self.frames

    def rate(self, schedule: Schedule) -> float:
        """Frames per second of a stream that runs alone."""
        return self.frames / self.seconds(later_nfe(schedule))

    def learn(self, seconds: float, nfe: int) -> None:
        """Take a chunk of `nfe` evaluations that took `seconds` into the running mean."""
        self.evaluation += 0.05 * (seconds / (nfe + self.decode) - self.evaluation)


def later_nfe(schedule: Schedule) -> int:
    """NFE of each chunk after those that the schedule lists."""
    chunk = len(schedule.timesteps_by_chunk)
    return schedule.nfe(chunk + 1) - schedule.nfe(chunk)
