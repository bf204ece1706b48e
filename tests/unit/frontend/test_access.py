"""Keys applied to calls: every method has a group, what is not allowed is denied, and changes keep who is known."""

from __future__ import annotations

import grpc
import pytest

from service.config.keys import Caller, Group, Keys, digest_of
from service.errors import Forbidden, ServiceError, Unauthenticated
from service.frontend.access import ANONYMOUS, GROUPS, Access
from service.pb import grpc_service_pb2 as pb

INFER = "/inference.GRPCInferenceService/ModelInfer"
INDEX = "/inference.GRPCInferenceService/RepositoryIndex"
CONFIG = "/inference.GRPCInferenceService/ModelConfig"
NOBODY = Caller("anonymous", frozenset({Group.HEALTH}))


def keys(**callers: Caller) -> Keys:
    return Keys({digest_of(key): caller for key, caller in callers.items()}, NOBODY)


def shop(*groups: Group, models: tuple[str, ...] = ("fraud",)) -> Caller:
    return Caller("shop", frozenset(groups), models)


def bearer(key: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {key}")]


def test_every_method_of_the_protocol_has_a_group() -> None:
    """One that had none could not be called with any key; docs/security.md lists them."""
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert {f"/{service.full_name}/{method.name}" for method in service.methods} <= set(GROUPS)
    assert len(GROUPS) == len(service.methods) + 3  # Check, Watch, reflection


def test_who_is_who() -> None:
    access = Access(keys(a=shop(Group.INFERENCE), b=shop(Group.METADATA)))
    assert access.identify([]) == ANONYMOUS
    first, second = access.identify(bearer("a")), access.identify(bearer("b"))
    assert len({ANONYMOUS, first, second}) == 3
    assert access.number_of("bearer   a ") == first
    for wrong in ("Bearer c", "Bearer", "a", "Basic a", "", "Bearer é"):
        with pytest.raises(Unauthenticated):
            access.number_of(wrong)


def test_a_key_keeps_its_number_while_it_is_there() -> None:
    """A call that is in progress while the file is read again is still known; one of a key that is gone is not."""
    access = Access(keys(a=shop(Group.INFERENCE), b=shop(Group.INFERENCE)))
    a, b = access.identify(bearer("a")), access.identify(bearer("b"))
    told: list[int] = []
    access.on_update = lambda: told.append(len(access.table()[0]))
    access.update(keys(a=shop(Group.INFERENCE, models=("other",)), c=shop(Group.INFERENCE)))
    assert told == [2]
    assert access.identify(bearer("a")) == a
    access.check_infer(a, "other", shared_memory=False)
    with pytest.raises(Forbidden):
        access.check_infer(a, "fraud", shared_memory=False)
    with pytest.raises(Unauthenticated, match="not valid any more"):
        access.check_infer(b, "fraud", shared_memory=False)
    assert access.identify(bearer("c")) not in (a, b)
    # A key that comes back is another one: its old number means nobody for good.
    access.update(keys(b=shop(Group.INFERENCE)))
    assert access.identify(bearer("b")) != b


def denied(access: Access, number: int, method: str, request: object = None) -> type[ServiceError] | None:
    try:
        access.check(number, method)
        access.check_request(number, method, request)
    except ServiceError as error:
        return type(error)
    return None


def test_groups_and_models() -> None:
    access = Access(keys(a=shop(Group.METADATA), b=shop(Group.METADATA, models=("*",))))
    a, b = access.identify(bearer("a")), access.identify(bearer("b"))
    fraud, other = pb.ModelConfigRequest(name="fraud"), pb.ModelConfigRequest(name="other")
    assert denied(access, a, CONFIG, fraud) is None
    assert denied(access, a, CONFIG, other) is Forbidden
    assert denied(access, a, CONFIG, pb.ModelConfigRequest()) is Forbidden
    assert denied(access, b, CONFIG, other) is None
    assert denied(access, a, INDEX, pb.RepositoryIndexRequest()) is Forbidden
    assert denied(access, b, INDEX, pb.RepositoryIndexRequest()) is None
    assert denied(access, ANONYMOUS, CONFIG, fraud) is Unauthenticated
    assert denied(access, a, INFER) is Forbidden
    assert denied(access, b, "/some.Other/Method") is Forbidden
    assert denied(access, ANONYMOUS, "/some.Other/Method") is Unauthenticated


def test_what_identifies_callers_itself_is_told_who_may_infer() -> None:
    access = Access(keys(a=shop(Group.INFERENCE), b=shop(Group.METADATA)))
    rows, anonymous = access.table()
    assert {digest: may for digest, _, may in rows} == {digest_of("a"): True, digest_of("b"): False}
    assert anonymous == (ANONYMOUS, False)
    open_to_all = Access(Keys({}, Caller("anonymous", frozenset({Group.INFERENCE}), ("*",))))
    assert open_to_all.table() == ([], (ANONYMOUS, True))
    open_to_all.check_infer(ANONYMOUS, "any", shared_memory=False)
    with pytest.raises(Unauthenticated):
        open_to_all.check_infer(ANONYMOUS, "any", shared_memory=True)


def test_the_metrics_port() -> None:
    access = Access(keys(a=shop(Group.METRICS), b=shop(Group.INFERENCE)))
    access.check_scrape("Bearer a")
    with pytest.raises(Forbidden):
        access.check_scrape("Bearer b")
    for nobody in ("Bearer x", None):
        with pytest.raises(Unauthenticated):
            access.check_scrape(nobody)


def test_the_status_codes_are_those_of_the_field() -> None:
    from service.frontend.status import STATUS

    assert STATUS[Unauthenticated] is grpc.StatusCode.UNAUTHENTICATED
    assert STATUS[Forbidden] is grpc.StatusCode.PERMISSION_DENIED
