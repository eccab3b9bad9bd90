"""mmseg without ftfy and regex."""

import pytest


@pytest.mark.parametrize('missing', ['ftfy', 'regex'])
def test_import_fails_without_it(missing: str, python):
    python(
        f"""
        from mmvig import compat
        [finder] = [finder for finder in sys.meta_path if getattr(finder, 'name', '') == 'mmseg.utils.tokenizer']
        sys.meta_path.remove(finder)
        try:
            import mmseg.utils
        except ModuleNotFoundError as error:
            assert error.name == {missing!r}
        else:
            sys.exit('mmseg no longer needs it')
        """,
        block=(missing,),
    )


def test_everything_but_the_tokenizer_works(python):
    python(
        """
        import mmvig
        import mmseg.models, mmseg.datasets
        from mmseg.utils import tokenize, tokenizer
        from mmseg.registry import MODELS
        assert MODELS.get('EncoderDecoder')
        for call in (lambda: tokenize('a cat'), lambda: tokenizer.tokenize('a cat')):
            try:
                call()
            except ImportError as error:
                assert 'pip install ftfy regex' in str(error), error
            else:
                sys.exit('tokenized')
        """,
        block=('ftfy', 'regex'),
    )


def test_the_real_tokenizer_stays(python):
    python("""
        from mmvig import compat
        assert not any(change.name == 'mmseg tokenizer' for change in compat.report())
        from mmseg.utils import tokenize
        assert tokenize('a cat').shape == (1, 77)
    """)
