"""Transfer learning without a training framework: a frozen network, a small head of one's own, served in minutes.

`reading` reads examples, `splits` keeps training and test apart, `backbone` cuts a network before its classifier,
`features` runs it, `heads` fits and calibrates, `evaluate` compares with what would have been there anyway, `compose`
makes one model of the two, `report` shows it, and `pipeline` goes all the way to a new version in a repository. The
command is in `command`.
"""
