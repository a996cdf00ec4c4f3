"""The repetitions of a step: which nodes of a recorded graph are the same line of a loop."""

from collections import defaultdict

from nn_backprop.check.diagnosis.recorded import Graph


class Loops:
    """Groups of nodes that are one step of a loop, and each node's place among them."""

    def __init__(self, graph: Graph, same: dict[int, int]) -> None:
        """`same` has, of the values that are equal, the first."""
        self.g, self.same = graph, same
        alike: dict[tuple, list[int]] = defaultdict(list)
        for i, node in enumerate(self.g.nodes):
            shapes = tuple(tuple(self.g.values[v].shape) for _, v in node.operands())
            alike[(node.site, node.op, shapes)].append(i)
        counts: dict[tuple, list[int]] = defaultdict(list)  # of a loop inside one call
        for (site, *_), members in alike.items():
            counts[site].append(len(members))
        self.groups: dict[tuple, list[int]] = {}
        self.place: dict[int, tuple[tuple, int]] = {}
        for key, members in alike.items():
            often = [n for n in counts[key[0]] if n > 1]
            most = 0.8 * sum(often)
            steps = max([1, *(n for n in often if sum(c for c in often if c % n == 0) >= most)])
            stride = len(members) // steps if steps > 1 and len(members) % steps == 0 else 1
            for r in range(stride):
                self.groups[(*key, r)] = members[r::stride]
                for ordinal, i in enumerate(members[r::stride]):
                    self.place[i] = ((*key, r), ordinal)

        self.starts: dict[int, list[tuple]] = defaultdict(list)
        for members in self.groups.values():  # what a loop carries starts from another value
            if len(members) > 1:
                first, second = (dict(self.g.nodes[i].operands()) for i in members[:2])
                for k, v in first.items():
                    if k in second and len(role := self.roles(second[k], members[1])[0]) > 2:
                        self.starts[self.same.get(v, v)].append(role)

    def roles(self, v: int, i: int) -> list[tuple]:
        """What value v is to node i, said so that it holds at each repetition of i."""
        ordinal = self.place[i][1]
        maker = self.g.maker.get(v)
        starts = self.starts[v] if ordinal == 0 and v in self.starts else []
        if maker is None or len(self.groups[self.place[maker][0]]) == 1:
            return [("value", v), *starts]
        made, when = self.place[maker]
        return [(made, self.g.nodes[maker].outs.index(v), when - ordinal), *starts]

    def serial(self, members: list[int], vs: set[int]) -> bool:
        """Whether the mistake at one member changes what another one receives."""
        mask = sum(1 << i for i in members)
        return any(self.g.before[v] & mask for v in vs)
