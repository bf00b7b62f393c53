"""What chunks cost on a worker, which decides how many streams it takes."""

from dataclasses import dataclass

from model.schedule import Schedule

HEADROOM = 0.9  # of a worker's time that streams may take


@dataclass
class Costs:
    """What a chunk costs on a worker, measured there and kept up to date by what its chunks take."""

    evaluation: float  # seconds of one evaluation of the student
    decode: float  # evaluations that decoding takes as long as
    frames: int  # pixel frames of a later chunk
    fps: int

    def seconds(self, nfe: int) -> float:
        """Of a chunk of so many evaluations."""
        return self.evaluation * (nfe + self.decode)

    def share(self, schedule: Schedule) -> float:
        """Of the worker's time that a stream takes which is played at its rate."""
        return self.seconds(later_nfe(schedule)) * self.fps / self.frames

    def rate(self, schedule: Schedule) -> float:
        """Frames a second of a stream alone."""
        return self.frames / self.seconds(later_nfe(schedule))

    def learn(self, seconds: float, nfe: int) -> None:
        self.evaluation += 0.05 * (seconds / (nfe + self.decode) - self.evaluation)


def later_nfe(schedule: Schedule) -> int:
    """Evaluations of each chunk after the schedule's own rows."""
    chunk = max(len(schedule.timesteps_by_chunk), *(chunk + 1 for chunk, _ in schedule.context_exceptions), 1)
    return schedule.nfe(chunk + 1) - schedule.nfe(chunk)
