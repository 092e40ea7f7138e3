"""What a run did, in numbers and pictures.

``flops`` counts compute and needs torch alone; ``text`` colours tokens by depth; ``depth``,
``curves`` and ``pareto`` draw; ``page`` puts all of it into one HTML file.
"""
