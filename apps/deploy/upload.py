"""Sends a Space's folder to the hub."""

from __future__ import annotations

from pathlib import Path

from apps.deploy.plan import HARDWARE, DeployError, Plan

__all__ = ["upload"]


def upload(plan: Plan, folder: Path) -> str:
    """Make the Space where there is none, make its files those of `folder`, ask for the hardware. Returns its address.

    Raises DeployError with what the hub said.
    """
    from huggingface_hub import HfApi, SpaceHardware
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api, hardware = HfApi(), SpaceHardware(HARDWARE.get(plan.hardware, plan.hardware))
    try:
        url = api.create_repo(
            plan.space, repo_type="space", space_sdk="gradio", space_hardware=hardware,
            private=plan.private or None, exist_ok=True,
        )  # fmt: skip
        api.upload_folder(
            repo_id=plan.space,
            repo_type="space",
            folder_path=folder,
            commit_message=f"{plan.app.title} with {plan.spec.title}",
            # What an earlier upload left and this one does not replace.
            delete_patterns=["*.whl", "weights/*"],
        )
        # A Space that was there already keeps its hardware unless told.
        api.request_space_hardware(plan.space, hardware)
    except LocalTokenNotFoundError as error:
        raise DeployError("upload: no token of the hub is here; run `hf auth login` or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise DeployError("upload: HF_HUB_OFFLINE is set, so nothing can be sent; unset it") from error
    except (HfHubHTTPError, OSError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DeployError(f"upload: the hub did not take {plan.space}: {said}") from error
    return str(url)
