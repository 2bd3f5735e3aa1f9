"""From a conversation to the token ids that ask for its next message, in a prompt style. Torch-free."""

from litlora.data.conversation import Conversation, Message
from litlora.data.encode import Encoder
from litlora.errors import DataError, UserError, setting
from litlora.prompts import PromptStyle
from litlora.prompts.shown import Asked, check_context
from litlora.prompts.template import ChatTemplate, template_message
from litlora.stop_tokens import taught_stops
from litlora.tokenizer import Tokenizer


class Asker:
    """Asks a model in one style, with the token ids that training has of the same conversation."""

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle) -> None:
        self.tokenizer, self.style = tokenizer, style
        self._encoder = Encoder(tokenizer, style)
        self.stop_ids = tokenizer.stop_ids | {*taught_stops(tokenizer, style)}
        """The tokens at which an answer ends: as in training, and as the model's files say."""

    def ids(self, conversation: Conversation) -> list[int]:
        """The prompt for an answer to the last message. Raises UserError for what the style has no
        place for."""
        if self.style.template is not None:
            return self.tokenizer.encode(self._rendered(self.style.template, conversation))
        *past, last = conversation.messages
        if last.role != "user":
            raise DataError(
                f"{conversation.place}: the last message is the {last.role}'s; the prompt style "
                f"{self.style.name} answers the user's"
            )
        asked = self.tokenizer.encode(self.style.render(last.content, last.input), begin=True)
        return [*self._past(past, conversation), *asked]

    def _past(self, past: list[Message], conversation: Conversation) -> list[int]:
        """The ids of the turns before the question, in a style that is not a chat template."""
        if conversation.tools or any(message.role in ("system", "tool") for message in past):
            raise DataError(
                f"{conversation.place}: the prompt style {self.style.name} has no place for tools or a "
                f"system message; {setting('prompt_style')} template or chatml has"
            )
        if not past:
            return []
        (encoded,) = self._encoder.encode([Conversation(tuple(past), conversation.place)])
        return encoded.drafts[-1].ids

    def _rendered(self, template: ChatTemplate, conversation: Conversation) -> str:
        given = [template_message(m.role, m.content, m.input, m.more) for m in conversation.messages]
        tools = [*conversation.tools] or None
        try:
            text = template.render(given, tools=tools)
            check_context(template, Asked(given, (), tools), range(len(given)), text, 0)
        except UserError as error:
            raise DataError(f"{conversation.place}: {error.args[0]}") from None
        hidden = [name for tool in conversation.tools if (name := tool["function"]["name"]) not in text]
        if hidden:
            raise DataError(
                f"{conversation.place}: {template.path}: the chat template leaves out the tool {hidden[0]}; "
                f"{setting('prompt_style')} chatml has a place for tools"
            )
        return text
