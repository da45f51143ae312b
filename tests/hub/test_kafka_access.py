"""What opens a Kafka cluster, from settings and arguments: what goes together, what does not, and that nothing of it is shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("confluent_kafka", reason="confluent-kafka is not installed: pip install 'penstock[kafka]'")

from penstock import EventProcessorHost
from penstock.errors import SettingsError
from penstock.hub.kafka_access import reached
from penstock.hub.kafka_cluster import Address
from penstock.hub.kafka_security import Security
from penstock.settings import load, of_command
from penstock.testing import MemoryBlobs

URL = "kafka://b-1:9092,b-2:9092/telemetry"
SECRET = "c2VjcmV0IG9mIGEga2V5="
STRING = f"Endpoint=sb://ns.servicebus.windows.net/;SharedAccessKeyName=root;SharedAccessKey={SECRET}"


def read(url: str = URL, environ: dict[str, str] | None = None, **flags: str) -> tuple[Address, Security]:
    given: dict[str, str | bool | None] = {name.replace("_", "-"): value for name, value in flags.items()}
    return reached(url, load("host", given, {f"PENSTOCK_{name}": text for name, text in (environ or {}).items()}))


@pytest.fixture
def password_file(tmp_path: Path) -> str:
    path = tmp_path / "password"
    path.write_text("s3cret word\n")
    return str(path)


@pytest.fixture
def pem(tmp_path: Path) -> str:
    path = tmp_path / "a.pem"
    path.write_text("-----BEGIN CERTIFICATE-----\n")
    return str(path)


def test_nothing_is_asked_for() -> None:
    address, security = read()
    assert str(address) == URL
    assert security.options() == {"security.protocol": "plaintext"}


def test_a_password_from_a_file_or_the_environment(password_file: str, pem: str) -> None:
    sasl = {"security.protocol": "sasl_plaintext", "sasl.username": "u", "sasl.password": "s3cret word"}
    environ = {"KAFKA_SECURITY": "sasl_plaintext", "KAFKA_USER": "u", "KAFKA_PASSWORD": "s3cret word"}
    assert read(environ=environ)[1].options() == {**sasl, "sasl.mechanism": "PLAIN"}
    environ["KAFKA_PASSWORD"] = "another"
    found = read(
        environ=environ,
        kafka_password_file=password_file,
        kafka_mechanism="SCRAM-SHA-512",
        kafka_security="sasl_ssl",
        ca=pem,
    )
    assert found[1].options() == {
        **sasl, "sasl.mechanism": "SCRAM-SHA-512", "security.protocol": "sasl_ssl", "ssl.ca.location": pem,
    }  # fmt: skip


def test_a_certificate_with_its_key_in_the_same_file_or_in_another(pem: str) -> None:
    options = read(kafka_security="ssl", certificate=pem)[1].options()
    assert options == {"security.protocol": "ssl", "ssl.certificate.location": pem, "ssl.key.location": pem}
    assert (
        read(kafka_security="ssl", certificate=pem, certificate_key=__file__)[1].options()["ssl.key.location"]
        == __file__
    )


def test_no_password_is_ever_shown_or_on_a_command_line(password_file: str) -> None:
    _, security = read(kafka_security="sasl_ssl", kafka_user="u", kafka_password_file=password_file)
    assert "s3cret" not in repr(security) + str(security)
    [setting] = [setting for setting in of_command("host") if setting.name == "kafka-password"]
    assert (setting.option, setting.variable) == ("", "PENSTOCK_KAFKA_PASSWORD")


@pytest.mark.parametrize(
    ("flags", "environ", "says"),
    [
        ({"kafka_security": "sasl_ssl"}, {}, "sasl_ssl needs --kafka-user too"),
        ({"kafka_security": "sasl_ssl", "kafka_user": "u"}, {}, "needs --kafka-password-file or PENSTOCK_KAFKA_PASSWORD"),
        ({"kafka_security": "ssl", "kafka_user": "u"}, {}, "A user for Kafka means nothing with --kafka-security ssl"),
        ({}, {"KAFKA_PASSWORD": SECRET}, "A password for Kafka means nothing with --kafka-security plaintext"),
        ({"ca": __file__}, {}, "--ca means nothing with --kafka-security plaintext"),
        ({"kafka_security": "ssl", "ca": "/nowhere"}, {}, "--ca /nowhere cannot be read: No such file"),
        ({"kafka_security": "ssl", "certificate_key": __file__}, {}, "means nothing without --certificate"),
        ({"kafka_password_file": "/nowhere"}, {}, "--kafka-password-file /nowhere cannot be read: No such file"),
        ({"kafka_password_file": "/dev/null"}, {}, "--kafka-password-file /dev/null is empty"),
        ({"kafka_security": "sasl_ssl", "kafka_user": "u"}, {"KAFKA_PASSWORD": f"{SECRET}\n{SECRET}"}, "one line of text"),
        ({"kafka_security": "tls"}, {}, "must be one of plaintext, ssl"),
        ({"kafka_mechanism": "GSSAPI"}, {}, "must be one of PLAIN, SCRAM"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(flags: dict[str, str], environ: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(says)) as refused:
        read(environ=environ, **flags)
    assert SECRET not in refused.value.detail


def test_a_ca_for_other_commands_in_the_environment_is_no_matter() -> None:
    assert read(environ={"CA": "/nowhere"})[1].options() == {"security.protocol": "plaintext"}


class TestArguments:
    """Of a program, which is told what it wrote; who comes in by them: tests/e2e/test_kafka_security.py."""

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"security": "tls"}, "kafka_security must be one of plaintext, ssl, sasl_plaintext, sasl_ssl, not 'tls'"),
            ({"security": "sasl_ssl", "mechanism": "GSSAPI"}, "kafka_mechanism must be one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512"),
            ({"security": "sasl_ssl"}, "kafka_security sasl_ssl needs kafka_user too"),
            ({"security": "sasl_ssl", "user": "u"}, "needs kafka_password_file or kafka_password too"),
            ({"password": SECRET}, "A password for Kafka means nothing with kafka_security plaintext"),
            ({"password_file": "/nowhere"}, "kafka_password_file /nowhere cannot be read: No such file"),
            ({"password": STRING}, "hub names b-1:9092,b-2:9092, and the Endpoint of the connection string"),
        ],
    )  # fmt: skip
    def test_what_does_not_go_together_is_refused(self, arguments: dict[str, str], says: str) -> None:
        given: dict[str, Any] = {f"kafka_{name}": text for name, text in arguments.items()}
        with pytest.raises(SettingsError, match=re.escape(says)) as refused:
            EventProcessorHost(URL, group="g", store=MemoryBlobs(), **given)
        assert SECRET not in refused.value.detail

    def test_a_connection_string_and_certificates(self) -> None:
        with pytest.raises(SettingsError, match="with kafka_mechanism PLAIN, and of no other"):
            EventProcessorHost("kafka:///t", group="g", store=MemoryBlobs(), kafka_password=STRING, kafka_user="me")
        with pytest.raises(SettingsError, match="ca means nothing with kafka_security plaintext"):
            EventProcessorHost(URL, group="g", store=MemoryBlobs(), ca=__file__)
        with pytest.raises(SettingsError, match="certificate_key means nothing without certificate"):
            EventProcessorHost(URL, group="g", store=MemoryBlobs(), kafka_security="ssl", certificate_key=__file__)


class TestConnectionString:
    def test_it_says_everything(self) -> None:
        for url, string in (
            ("kafka:///telemetry", STRING),
            ("kafka:///", f"{STRING};EntityPath=telemetry"),
            ("kafka://ns.servicebus.windows.net:9093/telemetry", f"{STRING};EntityPath=telemetry"),
        ):
            address, security = read(url, {"KAFKA_PASSWORD": f"{string}\n"})
            assert str(address) == "kafka://ns.servicebus.windows.net:9093/telemetry"
            assert security.event_hubs
            options = security.options()
            assert options["security.protocol"] == "sasl_ssl"
            assert (options["sasl.username"], options["sasl.password"]) == ("$ConnectionString", string)
            assert options["sasl.mechanism"] == "PLAIN"
            assert options["connections.max.idle.ms"] == options["metadata.max.age.ms"] == 180_000

    def test_the_emulator_and_other_clouds(self) -> None:
        string = "Endpoint=sb://localhost:9092;SharedAccessKeyName=r;SharedAccessKey=k;UseDevelopmentEmulator=true;"
        address, security = read("kafka:///t", {"KAFKA_PASSWORD": string}, kafka_security="sasl_plaintext")
        assert (str(address), security.protocol) == ("kafka://localhost:9092/t", "sasl_plaintext")

    @pytest.mark.parametrize(
        ("url", "string", "flags", "says"),
        [
            ("kafka:///", STRING, {}, "is not an address"),
            ("kafka://b:9092/t", STRING, {}, "b:9092, and the Endpoint of the connection string ns.servicebus.windows.net:9093"),
            ("kafka:///t", f"{STRING};EntityPath=u", {}, "--hub names t, and the EntityPath of the connection string u"),
            ("kafka:///t", STRING.replace("SharedAccessKeyName=root;", ""), {}, "has no SharedAccessKeyName"),
            ("kafka:///t", STRING.replace("sb:", "https:"), {}, "not of the form sb://HOST/"),
            ("kafka:///t", STRING, {"kafka_user": "me"}, "is the password of the user $ConnectionString"),
            ("kafka:///t", STRING, {"kafka_mechanism": "SCRAM-SHA-256"}, "with --kafka-mechanism PLAIN"),
            ("kafka:///t", STRING, {"kafka_security": "ssl"}, "means nothing with --kafka-security ssl"),
        ],
    )  # fmt: skip
    def test_what_contradicts_it_is_refused(self, url: str, string: str, flags: dict[str, str], says: str) -> None:
        with pytest.raises(SettingsError, match=re.escape(says)) as refused:
            read(url, {"KAFKA_PASSWORD": string}, **flags)
        assert SECRET not in refused.value.detail
