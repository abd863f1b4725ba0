from common.not_applicable import NOT_APPLICABLE, matches


def test_every_entry_names_a_test(request):
    """Run with the whole folder: it looks among the tests that were collected."""
    tests = [item for item in request.session.items if item.cls]
    assert [pattern for pattern in NOT_APPLICABLE if not any(matches(pattern, item) for item in tests)] == []
