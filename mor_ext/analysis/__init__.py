"""What a run did, in numbers and pictures.

``flops`` counts compute; ``rank`` relates depth and loss; ``text`` colours tokens by depth;
``depth``, ``curves`` and ``pareto`` draw; ``page`` writes one HTML file, ``report`` that of a run.
All but ``flops`` and ``rank`` need the extra ``mor_ext[demo]``.
"""
